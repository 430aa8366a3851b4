"""A streamed answer, put together, is the whole answer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from shoal.clients import Completion, ProtocolError, ShoalClient, ToolCall, Usage, wire
from shoal.clients.whole import GrowingAnswer
from tests.clients.conftest import Driver
from tests.clients.fake_server import USAGE, FakeServer, chat_chunks, chat_deltas, completion_chunks

HELLO: Any = [{"role": "user", "content": "hello"}]
CALL = wire.stream_chat(HELLO, {})


def read(events: list[dict[str, Any]]) -> Completion[Any]:
    answer = GrowingAnswer(None)
    for event in events:
        answer.add(CALL.build(event))
    return answer.whole()


# -- the law -----------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12)
CALLS = st.lists(st.tuples(st.sampled_from(["weather", "clock"]), TEXTS), max_size=3)


@st.composite
def pieces(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    return [text[i:j] for i, j in pairwise([0, *cuts, len(text)])]


@st.composite
def choices(draw: st.DrawFn, index: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One choice as it is streamed, and as a whole."""
    thought, text, calls = draw(TEXTS), draw(TEXTS), draw(CALLS)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    deltas: list[dict[str, Any]] = [{"content": piece} for piece in draw(pieces(text))]
    if thought:
        message["reasoning_content"] = thought
        deltas = [*({"reasoning_content": piece} for piece in draw(pieces(thought))), *deltas]
    if calls:
        message["tool_calls"] = []
    for number, (name, arguments) in enumerate(calls):
        called = {"id": f"call_{index}_{number}", "type": "function"}
        message["tool_calls"].append({**called, "function": {"name": name, "arguments": arguments}})
        deltas.append({"tool_calls": [{"index": number, **called, "function": {"name": name, "arguments": ""}}]})
        for piece in draw(pieces(arguments)):
            deltas.append({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})

    has_scores = draw(st.booleans())
    scored = [{"content": [score(n)], "refusal": None} if has_scores else None for n in range(len(deltas))]
    all_scores = {"content": [score(n) for n in range(len(deltas))], "refusal": None} if has_scores else None
    reason = "tool_calls" if calls else draw(st.sampled_from(["stop", "length"]))
    events = [
        event(index, {"role": "assistant", "content": ""}, None, None),
        *(event(index, delta, None, scores) for delta, scores in zip(deltas, scored, strict=True)),
        event(index, {}, reason, None),
    ]
    return events, {"index": index, "message": message, "finish_reason": reason, "logprobs": all_scores}


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a streamed answer of several choices, and the same answer as a whole."""
    head = {"id": "chatcmpl-1", "created": 1700000000, "model": "shoal"}
    drawn = [draw(choices(index)) for index in range(draw(st.integers(1, 3)))]
    chunk = {**head, "object": "chat.completion.chunk"}
    mixed = interleaved([events for events, _ in drawn], draw(st.randoms(use_true_random=False)))
    chunks = [*({**chunk, "choices": [one]} for one in mixed), {**chunk, "choices": [], "usage": USAGE}]
    return chunks, {**head, "object": "chat.completion", "choices": [whole for _, whole in drawn], "usage": USAGE}


def event(index: int, delta: dict[str, Any], reason: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}


def score(number: int) -> dict[str, Any]:
    return {"token": str(number), "logprob": -0.5 * number, "bytes": None, "top_logprobs": []}


def interleaved(streams: list[list[Any]], random: Any) -> list[Any]:
    """All of them, each in its order.  They begin in order, as the official client expects."""
    left = [list(stream) for stream in streams]
    mixed = [stream.pop(0) for stream in left]
    while any(left):
        mixed.append(random.choice([stream for stream in left if stream]).pop(0))
    return mixed


@given(answers())
@settings(max_examples=50)
def test_what_is_streamed_is_the_whole_answer(answer: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    """And what the official client puts together."""
    chunks, whole = answer
    state: ChatCompletionStreamState[Any] = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    build = wire.chat(HELLO, {}).build
    assert read(chunks) == build(whole) == build(state.current_completion_snapshot.model_dump())


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_chunk_has_the_new_pieces(server: FakeServer, driver: Driver) -> None:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    second = {"index": 0, "function": {"arguments": "{}"}}
    deltas = [{"reasoning_content": "Hm"}, {"content": "I"}, {"tool_calls": [first]}, {"tool_calls": [second]}]
    server.stream(*chat_deltas(*deltas, finish_reason="tool_calls"))
    chunks = driver.stream("stream_chat", HELLO)[1:5]
    assert [chunk.reasoning for chunk in chunks] == ["Hm", "", "", ""]
    assert [chunk.text for chunk in chunks] == ["", "I", "", ""]
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert [(call.index, call.id, call.name, call.arguments_json) for call in calls] == [
        (0, "call_1", "f", ""),
        (0, None, None, "{}"),
    ]


def test_the_whole_of_a_stream_is_read_to_its_end(server: FakeServer, driver: Driver) -> None:
    server.stream(*completion_chunks("The ", "größte ", "🐟", seed=3))
    answer = driver.whole("stream_complete", "x", num_chunks=2)
    assert (answer.text, answer.usage, answer.seed) == ("The größte 🐟", Usage(5, 2, 4, 1, 3), 3)
    assert (answer.id, answer.created, answer.model) == ("cmpl-1", 1700000000, "shoal")


def test_calls_that_other_servers_stream(server: FakeServer, driver: Driver) -> None:
    """Without an index, type or usage, and with nulls."""
    whole = {"index": None, "id": "call_1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    nulls = {"content": None, "reasoning_content": None, "tool_calls": None}
    rest = {"function": {"arguments": " "}}
    server.stream(*chat_deltas(nulls, {"tool_calls": [whole]}, {"tool_calls": [rest]}, finish_reason="tool_calls")[:-1])
    answer = driver.whole("stream_chat", HELLO)
    assert answer.tool_calls == (ToolCall("call_1", "f", '{"a": 1} '),)
    assert answer.usage == Usage(0, 0)


def test_a_stream_that_is_closed_has_no_whole(server: FakeServer) -> None:
    server.stream(*chat_chunks("a", "b"))
    with ShoalClient(server.url) as client:
        with client.stream_chat(HELLO) as stream:
            next(stream)
        with pytest.raises(ProtocolError, match="finish_reason"):
            stream.whole()
        with client.stream_chat(HELLO) as stream:
            pass
        with pytest.raises(ProtocolError, match="without an answer"):
            stream.whole()
