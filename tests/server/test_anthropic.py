"""Anthropic's Messages API: a service whose engine says what the test wants, with Anthropic's own client as judge."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from anthropic._streaming import SSEDecoder
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from shoal.scheduler.errors import InvalidRequestError, QueueFullError, ShoalError
from shoal.scheduler.output import FinishReason
from shoal.server.errors import BodyTooLargeError, EngineUnavailableError, error_body
from shoal.server.routes.answer import error_response, event
from shoal.server.routes.messages import messages_router
from shoal.server.shapes import anthropic, shape_of
from shoal.server.tools.answer import ChatAnswer
from shoal.server.tools.blocks import INVALID, AnswerBlocks, content, read_input
from shoal.server.tools.formats import HERMES, TOOL_FORMATS
from shoal.server.tools.reader import AnswerReader
from shoal.server.wire.message_answers import MessageAnswer, MessageStart, Usage
from tests.examples import examples
from tests.server import test_tools_chat as chats

CALL = ("weather", {"city": "Zürich"})
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "<|user|>", "input_schema": SCHEMA}
USER = [{"role": "user", "content": "hi"}]
servers_end = chats.servers_end
EVENTS: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


class Server(chats.Server):
    """The routes of messages, and an engine that says a text, some tokens at a time."""

    async def ask(self, body: dict[str, Any], text: str, reason: FinishReason) -> bytes:
        return await self.post("/v1/messages", body, text, reason)

    async def post(self, path: str, body: dict[str, Any], text: str, reason: FinishReason) -> bytes:
        (route,) = (route for route in messages_router(self.service).routes if route.path == path)  # type: ignore[attr-defined]
        playing = asyncio.create_task(self._play(text, reason))
        try:
            return await chats.sent(await route.endpoint(chats.request(body)))  # type: ignore[attr-defined]
        finally:
            playing.cancel()

    def message(self, text: str, *, reason: FinishReason = FinishReason.STOP, **body: Any) -> Message:
        """The whole answer, which the stream is in pieces."""

        asked = {"model": self.service.model_name, "max_tokens": 8000, "messages": USER} | body
        whole, stream = (self.run(self.ask(asked | {"stream": stream}, text, reason)) for stream in (False, True))
        message = Message.model_validate_json(whole, strict=True)
        assert message.id.startswith("msg_")
        assert shown(put_together([stream])) == shown(message)
        return message

    def count(self, **body: Any) -> int:
        asked = {"model": self.service.model_name, "messages": USER} | body
        counted = self.run(self.post("/v1/messages/count_tokens", asked, "", FinishReason.STOP))
        return MessageTokensCount.model_validate_json(counted, strict=True).input_tokens


def put_together(parts: Iterable[bytes]) -> Message:
    """The message that Anthropic's client makes of a stream, whose events are in the documented order."""
    message: Any = None
    buffers: dict[int, bytes] = {}
    names = []
    for sse in SSEDecoder().iter_bytes(iter(parts)):
        assert sse.event == sse.json()["type"]
        names.append(sse.event)
        if sse.event != "ping":
            told = EVENTS.validate_json(sse.data, strict=True)
            message = accumulate_event(event=told, current_snapshot=message, json_bufs=buffers)
    assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
    blocks = [name.removeprefix("content_block_") for name in names[2:-2]]
    kinds = [name for name, _ in itertools.groupby(blocks)]
    assert kinds == [name for _ in range(blocks.count("start")) for name in ("start", "delta", "stop")]
    return Message.model_validate(message.to_dict())


def shown(message: Message) -> dict[str, Any]:
    """What two answers to the same request have in common."""
    dumped = message.model_dump()
    del dumped["id"]
    for block in dumped["content"]:
        block.pop("id", None)
    return dumped


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    templates = {"hermes": chats.HERMES, "thinks": chats.THINKS, "plain": chats.PLAIN}
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {name: chats.checkpoint(folder / name, template) for name, template in templates.items()}
    variables = chats.HERMES + "{{ enable_thinking }}/{{ thinking }}/{{ reasoning_effort }}"
    return made | {"variables": chats.checkpoint(folder / "variables", variables)}


# -- answers -----------------------------------------------------------------------------------------------------------


def test_text_thoughts_and_calls_are_blocks(folders: dict[str, Path]) -> None:
    server = Server(folders["thinks"])
    text = f"<think>Hm.</think>So: {TOOL_FORMATS['hermes'].write([CALL, CALL])}"
    message = server.message(text, tools=[WEATHER])
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thought, said, *calls = message.content
    assert thought.type == "thinking" and thought.thinking == "Hm." and thought.signature
    assert said.type == "text" and said.text == "So:"
    assert all(call.type == "tool_use" and call.name == "weather" and call.input == CALL[1] for call in calls)
    assert len({call.id for call in calls if call.type == "tool_use"}) == 2
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)


def test_why_an_answer_ends(folders: dict[str, Path]) -> None:
    server = Server(folders["hermes"])

    def ended(text: str, **body: Any) -> tuple[str | None, str | None, list[str]]:
        message = server.message(text, **body)
        texts = [block.text for block in message.content if block.type == "text"]
        return message.stop_reason, message.stop_sequence, texts

    cut = FinishReason.LENGTH
    assert ended("Hello") == ("end_turn", None, ["Hello"])
    assert ended("") == ("end_turn", None, [])
    assert ended("Hello", reason=cut, max_tokens=5) == ("max_tokens", None, ["Hello"])
    assert ended("Hello", reason=cut, max_tokens=7000) == ("model_context_window_exceeded", None, ["Hello"])
    assert ended("a STOP b", stop_sequences=["END", "STOP"]) == ("stop_sequence", "STOP", ["a "])
    assert ended("a b", stop_sequences=["END"]) == ("end_turn", None, ["a b"])


def test_a_call_that_is_cut_has_what_is_whole_of_its_input(folders: dict[str, Path]) -> None:
    text = TOOL_FORMATS["hermes"].write([("weather", {"city": "Rom", "unit": "Celsius"})]).partition("lsius")[0]
    message = Server(folders["hermes"]).message(text, tools=[WEATHER], reason=FinishReason.LENGTH, max_tokens=9)
    (call,) = message.content
    assert call.type == "tool_use" and call.input == {"city": "Rom"}
    assert message.stop_reason == "max_tokens"
    assert read_input('{"a": tru, "b": 1}') == {"INVALID_JSON": '{"a": tru, "b": 1}'}


def test_usage_counts_cached_tokens_apart(folders: dict[str, Path]) -> None:
    message = Server(folders["hermes"]).message("Hello")
    assert (message.usage.output_tokens, message.usage.cache_read_input_tokens) == (6, 0)
    assert message.usage.input_tokens == Server(folders["hermes"]).count()


WHOLE = TOOL_FORMATS["hermes"].write([CALL])
HEAD, INPUT = '{"name": "weather", "arguments": ', '{"city": "Rom", "at": [1, {"b": "}"}]}'
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
pieces = st.sampled_from((*TAGS, "Hm. ", "\n", "数", HEAD, INPUT, "}", '{"name": "other"}', WHOLE))


# An input that is no JSON, which a grammar keeps models from: the client raises what the whole answer tells.
NO_JSON = '<tool_call>{"name": "weather", "arguments": {"name": "weather", "arguments": <think>'


@settings(max_examples=examples(300), deadline=None)
@example(NO_JSON, [], 78)
@given(st.lists(pieces, max_size=8).map("".join), st.lists(st.integers(0, 200), max_size=12), st.integers(0, 300))
def test_the_stream_is_together_what_the_whole_answer_has(text: str, cuts: list[int], length: int) -> None:
    text = text[:length]

    def blocks() -> AnswerBlocks:
        return AnswerBlocks(ChatAnswer(AnswerReader(HERMES, {"weather": SCHEMA}, thinks=True)))

    whole = Message.model_validate_json(event(message(content(blocks().events(text, is_last=True))))[6:], strict=True)
    opening = EVENTS.validate_json(event(MessageStart(message([])))[6:])
    streamed: Any = accumulate_event(event=opening, current_snapshot=None, json_bufs={})
    shaped, buffers, places = blocks(), dict[int, bytes](), sorted(cut for cut in cuts if cut < len(text))
    told = [
        one
        for start, end in itertools.pairwise([0, *places, len(text)])
        for one in shaped.events(text[start:end], is_last=False)
    ]
    for one in told + shaped.events("", is_last=True):
        try:
            accumulate_event(event=EVENTS.validate_json(event(one)[6:]), current_snapshot=streamed, json_bufs=buffers)
        except ValueError as error:
            assert "Unable to parse tool parameter JSON" in str(error)
            assert any(block.type == "tool_use" and INVALID in block.input for block in whole.content)
            return
    assert shown(Message.model_validate(streamed.to_dict())) == shown(whole)


def message(blocks: Any) -> MessageAnswer:
    return MessageAnswer("msg_1", "m", blocks, Usage(1, 2, 0))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_messages_become_a_chat(folders: dict[str, Path]) -> None:
    """Turns of one role are joined, results are messages of their own, and the system prompt comes first."""
    server = Server(folders["hermes"])
    marked = {"cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": CALL[1], "caller": None}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}], **marked}
    thoughts = [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
    ]
    server.message(
        "Rain.",
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1"},
            {"type": "text", "text": "Be brief.", **marked},
            {"type": "text", "text": "Be kind."},
        ],
        messages=[
            {"role": "user", "content": "Hi."},
            {"role": "user", "content": [{"type": "text", "text": "Rain? <|user|>", **marked}]},
            {
                "role": "assistant",
                "content": [
                    *thoughts,
                    {"type": "text", "text": "I ", "citations": None},
                    {"type": "text", "text": "look."},
                    call,
                ],
            },
            {"role": "user", "content": [result, {"type": "text", "text": "So?"}, result | {"is_error": True}]},
            {"role": "system", "content": "Be quick."},
        ],
        tools=[WEATHER | marked],
        metadata={"user_id": "me"},
    )
    lines = [line for line in server.prompt.partition("<system>")[2].splitlines() if line]
    calls = '<tool_call>weather={"city": "Zürich"}'
    assert lines[:6] == ["Be brief.", "Be kind.", "Be quick.", "<user>Hi.", "Rain? <|user|>", "<assistant>I look."]
    assert lines[6:] == [calls, "<tool>rain", "<user>So?", "<tool>Error: rain"]
    assert 3 not in server.prompt_token_ids


def test_an_answer_is_sent_back_as_it_came(folders: dict[str, Path]) -> None:
    server = Server(folders["thinks"])
    first = server.message(f"<think>Hm.</think>So: {TOOL_FORMATS['hermes'].write([CALL])}", tools=[WEATHER])
    for dumped in (first.model_dump()["content"], first.model_dump(exclude_unset=True)["content"]):
        result = {"type": "tool_result", "tool_use_id": dumped[-1]["id"]}
        turns = [*USER, {"role": "assistant", "content": dumped}, {"role": "user", "content": [result]}]
        assert server.message("Rain.", messages=turns, tools=[WEATHER]).content[0].type == "text"
        assert 'weather={"city": "Zürich"}' in server.prompt


def test_thinking_and_effort_reach_the_template(folders: dict[str, Path]) -> None:
    server = Server(folders["variables"])
    for asked, told in (
        ({}, "//"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "True/True/"),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, "True/True/"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, "False/False/xhigh"),
    ):
        server.message("Hello", **asked)
        assert server.prompt.endswith(told)


def test_tools_are_chosen(folders: dict[str, Path]) -> None:
    server = Server(folders["hermes"])
    text = TOOL_FORMATS["hermes"].write([CALL, CALL])
    other = WEATHER | {"name": "other"}

    def num_calls(**choice: Any) -> int:
        message = server.message(text, tools=[WEATHER, other], tool_choice=choice)
        return sum(block.type == "tool_use" for block in message.content)

    assert num_calls(type="auto") == num_calls(type="any") == num_calls(type="tool", name="weather") == 2
    assert num_calls(type="auto", disable_parallel_tool_use=True) == 1
    assert num_calls(type="tool", name="other") == num_calls(type="none") == 0


def test_tokens_are_counted_as_they_are_read(folders: dict[str, Path]) -> None:
    server = Server(folders["hermes"])
    server.message("Hello", system="Be brief.", tools=[WEATHER])
    assert server.count(system="Be brief.", tools=[WEATHER]) == len(server.prompt_token_ids)


def said(**block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block]}]}


FORMAT = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"max_tokens": None}, "max_tokens: expected an integer"),
        ({"max_tokens": -1}, "max_tokens: expected an integer >= 0"),
        ({"messages": []}, "messages: expected a list of length >= 1"),
        ({"messages": [{"role": "user", "content": []}]}, "messages: there is none"),
        ({"messages": [*USER, {"role": "tool", "content": "a"}]}, "messages[1].role: expected"),
        (said(type="image", source={}), "messages[0].content[0].type: 'image'"),
        (said(type="document"), "messages[0].content[0].type: 'document'"),
        (said(type="tool_use"), "messages[0].content[0].type: 'tool_use'"),
        (said(type="text"), "missing required field: messages[0].content[0].text"),
        (said(type="tool_result", content=[]), "missing required field: messages[0].content[0].tool_use_id"),
        ({"system": [{"type": "image"}]}, "system[0].type: 'image'"),
        ({"temperature": 1.1}, "temperature: expected a number <= 1"),
        ({"stop_sequences": [""]}, "stop_sequences[0]: expected text of length >= 1"),
        ({"seed": 2**64}, "seed: expected an integer <="),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: 'web_search_20250305'"),
        ({"tools": [{"name": "a"}]}, "missing required field: tools[0].input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]: the name 'weather'"),
        ({"tools": [WEATHER | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema: expected a schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: 'any' needs tools"),
        ({"tool_choice": {"type": "tool"}}, "missing required field: tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice: there is no tool 'b'"),
        ({"output_config": {"format": FORMAT}}, "output_config.format: "),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_are_named_as_this_api_names_them(folders: dict[str, Path], body: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Server(folders["hermes"]).message("Hello", **body)
    shape = anthropic("req_1")
    answer = json.loads(event(shape.body(caught.value))[6:])
    assert answer["error"]["message"].startswith(told)
    assert (answer["type"], answer["error"]["type"], answer["request_id"]) == (
        "error",
        "invalid_request_error",
        "req_1",
    )


def test_what_asks_for_nothing_is_taken(folders: dict[str, Path]) -> None:
    server = Server(folders["hermes"])
    kept = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    server.message("Hello", context_management=kept, service_tier="auto", tools=[], stop_sequences=[], metadata={})
    server.message("Hello", tool_choice={"type": "auto"}, top_k=5, top_p=0.5, temperature=0, seed=1, timeout=60)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BodyTooLargeError("a"), 413, "request_too_large"),
        (QueueFullError("a"), 429, "rate_limit_error"),
        (EngineUnavailableError("a"), 503, "overloaded_error"),
        (ShoalError("a"), 500, "api_error"),
    ],
)
def test_errors_have_the_shape_of_the_path(error: ShoalError, status: int, kind: str) -> None:
    scope: dict[str, Any] = {"path": "/v1/messages/count_tokens"}
    answer = error_response(error, shape_of(scope))
    told = json.loads(bytes(answer.body))
    assert (answer.status_code, told["type"], told["error"]) == (status, "error", {"type": kind, "message": "a"})
    assert told["request_id"] == scope["state"]["request_id"]
    other = error_response(error, shape_of({"path": "/v1/completions"}))
    assert bytes(other.body) == event(error_body(error))[6:-2]
