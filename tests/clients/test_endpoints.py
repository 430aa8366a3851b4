"""What the other endpoints are asked, and how answers are read, against the official clients where they have it."""

from __future__ import annotations

import json
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from shoal.clients import (
    BatchLine,
    Capabilities,
    ChatOptions,
    Completion,
    CompletionOptions,
    EmbeddingOptions,
    MessageOptions,
    Model,
    ProtocolError,
    ResponseOptions,
    StatusError,
    StreamError,
    TokenizationOptions,
    UnsendableError,
    Usage,
)
from shoal.server.wire.embeddings import EmbeddingsBody
from shoal.server.wire.items import ResponsesBody
from shoal.server.wire.messages import MessagesBody
from shoal.server.wire.requests import ChatBody, CompletionBody, TokenizeBody
from tests.clients.conftest import Driver
from tests.clients.fake_server import USAGE, Answer, FakeServer, chat_chunks, chat_completion, completion

HELLO: Any = [{"role": "user", "content": "hello"}]
TEXT = {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "Hi"}]}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Rome"}'}
RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "created_at": 5,
    "model": "shoal",
    "status": "completed",
    "output": [THOUGHT, TEXT, CALL],
    "usage": {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 1},
    },
}
MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "shoal",
    "content": [
        {"type": "thinking", "thinking": "Hm", "signature": "s"},
        {"type": "text", "text": "Hi"},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "cache_read_input_tokens": 4, "output_tokens": 3},
}
BATCH: dict[str, Any] = {
    "id": "batch_1",
    "endpoint": "/v1/chat/completions",
    "status": "completed",
    "input_file_id": "file-1",
    "completion_window": "24h",
    "created_at": 5,
    "request_counts": {"total": 3, "completed": 1, "failed": 2},
    "errors": None,
    "output_file_id": "file-2",
    "error_file_id": "file-3",
    "object": "batch",
}


class Mood(BaseModel):
    is_good: bool


def weather(city: str) -> str:
    """The weather of a city."""
    return city


def asked(server: FakeServer) -> list[tuple[str, str, Any]]:
    return [(one.method, one.path, one.body) for one in server.requests]


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (ChatOptions, ChatBody),
        (CompletionOptions, CompletionBody),
        (ResponseOptions, ResponsesBody),
        (MessageOptions, MessagesBody),
        (EmbeddingOptions, EmbeddingsBody),
        (TokenizationOptions, TokenizeBody),
    ],
)
def test_the_server_knows_every_option(options: Any, body: Any) -> None:
    known = {*body.__struct_fields__, *body.refused}
    assert set(options.__required_keys__ | options.__optional_keys__) <= known


# -- completions and chats -----------------------------------------------------------------------------------------


def test_what_an_answer_tells_beside_its_text(server: FakeServer, driver: Driver) -> None:
    usage = {**USAGE, "completion_tokens_details": {"reasoning_tokens": 2}}
    score = {"logprob": -0.5, "rank": 1, "decoded_token": "a"}
    scores = [None, {"7": score}]
    told = {"usage": usage, "system_fingerprint": "fp_1", "prompt_token_ids": [1, 7], "prompt_logprobs": scores}
    headers = {"x_request_id": "mine", "x_ignored_fields": "one, two"}
    server.json({**chat_completion("hi", token_ids=[4, 5]), **told}, **headers)
    answer: Completion[Any] = driver.call("chat", HELLO, request_id="mine", prompt_logprobs=1)
    assert (answer.request_id, answer.ignored_fields) == ("mine", ("one", "two"))
    assert (answer.system_fingerprint, answer.usage.num_reasoning_tokens) == ("fp_1", 2)
    assert (answer.prompt_token_ids, answer.token_ids) == ((1, 7), (4, 5))
    assert answer.prompt_logprobs == (None, {7: score})

    choice = {"index": 0, "text": "a", "finish_reason": "stop", "token_ids": [4], "prompt_token_ids": [1]}
    server.json(completion(choices=[choice]))
    assert driver.call("complete", "x").prompt_token_ids == (1,)

    events = chat_chunks("h", "i")
    events[0] |= {"prompt_token_ids": [1, 7], "system_fingerprint": "fp_1"}
    for event, token_id in zip(events[1:3], (4, 5), strict=True):
        event["choices"][0]["token_ids"] = [token_id]
    server.stream(*events, **headers)
    whole = driver.whole("stream_chat", HELLO)
    assert (whole.request_id, whole.ignored_fields, whole.system_fingerprint) == ("mine", ("one", "two"), "fp_1")
    assert (whole.prompt_token_ids, whole.token_ids) == ((1, 7), (4, 5))


# -- responses -----------------------------------------------------------------------------------------------------


def test_a_response_is_the_official_clients(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.json(RESPONSE, x_request_id="resp_1")
    options: dict[str, Any] = {"instructions": "Be brief.", "max_output_tokens": 7, "store": False}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as official:
        theirs = official.responses.create(input="hello", model="shoal", extra_body={"seed": 3}, **options)
    ours = driver.call("respond", "hello", model="shoal", seed=3, **options)
    first, second = asked(server)
    assert first == second
    assert (ours.text, ours.id, ours.status) == (theirs.output_text, theirs.id, theirs.status)
    assert (ours.reasoning, ours.tool_calls[0].arguments, ours.request_id) == ("Hm", {"city": "Rome"}, "resp_1")
    assert ours.usage == Usage(5, 3, num_cached_tokens=4, num_reasoning_tokens=1)


def test_tools_and_formats_of_a_response(server: FakeServer, driver: Driver) -> None:
    said = {**TEXT, "content": [{"type": "output_text", "text": '{"is_good": true}'}]}
    server.json({**RESPONSE, "output": [said]})
    answer = driver.call("respond", HELLO, tools=[weather], tool_choice=weather, response_format=Mood)
    assert answer.parsed == Mood(is_good=True)
    sent = server.requests[0].body
    assert sent["tools"][0] | {"parameters": None} == {
        "type": "function",
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": None,
        "strict": True,
    }
    assert sent["tool_choice"] == {"type": "function", "name": "weather"}
    assert sent["text"]["format"] == {"type": "json_schema", "name": "Mood", "schema": Mood.model_json_schema()}
    server.json(RESPONSE)
    (call,) = driver.call("respond", "x", tool_choice="required").tool_calls
    assert call.result_item({"a": 1}) == {"type": "function_call_output", "call_id": "call_1", "output": '{"a": 1}'}


def test_a_streamed_response(server: FakeServer, driver: Driver) -> None:
    begun = {**RESPONSE, "status": "in_progress", "output": [], "usage": None}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "sequence_number": 0, "response": begun},
        {"type": "response.reasoning_text.delta", "sequence_number": 1, "delta": "Hm"},
        {"type": "response.output_text.delta", "sequence_number": 2, "delta": "Hi"},
        {"type": "response.completed", "sequence_number": 3, "response": RESPONSE},
    ]
    for _ in range(2):
        server.stream(*events, done=False)
    read: Any = driver.stream("stream_respond", "hello")
    assert [one.sequence_number for one in read] == [0, 1, 2, 3]
    assert ("".join(one.text for one in read), "".join(one.reasoning for one in read)) == ("Hi", "Hm")
    assert server.requests[0].body == {"input": "hello", "stream": True}
    server.json(RESPONSE)
    assert driver.whole("stream_respond", "hello") == driver.call("respond", "hello")

    failed = {"type": "error", "sequence_number": 1, "error": {"message": "no", "type": "server_error", "code": "c"}}
    server.stream(events[0], failed, done=False)
    with pytest.raises(StreamError, match="no"):
        driver.stream("stream_respond", "hello")


def test_a_response_in_the_background_goes_on_and_is_not_ended_by_its_reader(
    server: FakeServer, driver: Driver
) -> None:
    last = {"type": "response.completed", "sequence_number": 9, "response": RESPONSE}
    server.stream(done=False, ending="cut")
    server.stream(last, done=False)
    assert driver.whole("stream_response", "resp_1", starting_after=4).text == "Hi"
    first, second = server.requests
    assert first.path == "/v1/responses/resp_1?stream=true&starting_after=4"
    assert (second.path, second.headers["last-event-id"]) == ("/v1/streams/resp_1", "resp_1:5")

    begun = {"type": "response.queued", "sequence_number": 0, "response": RESPONSE}
    refused = {"type": "error", "sequence_number": 1, "error": {"message": "no"}}
    server.stream(begun, refused, done=False, first=1, X_Stream_Resume="true")
    with pytest.raises(StreamError):
        driver.stream("stream_respond", "hello", background=True)
    assert "DELETE" not in [one.method for one in server.requests]


def test_what_is_asked_of_a_response_that_is_kept(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.json(RESPONSE)
    assert driver.call("response", "resp_1") == driver.call("cancel_response", "resp_1")
    server.json({"id": "resp_1", "object": "response", "deleted": True})
    assert driver.call("delete_response", "resp_1") is None
    server.json({"data": [TEXT], "has_more": True, "first_id": "msg_1", "last_id": "msg_1"})
    page = driver.call("input_items", "resp_1", limit=1, order="asc")
    assert (page.data, page.has_more, page.last_id) == ((TEXT,), True, "msg_1")
    server.json({"object": "response.input_tokens", "input_tokens": 12})
    assert driver.call("count_input_tokens", "hello") == 12
    assert asked(server) == [
        ("GET", "/v1/responses/resp_1", None),
        ("POST", "/v1/responses/resp_1/cancel", None),
        ("DELETE", "/v1/responses/resp_1", None),
        ("GET", "/v1/responses/resp_1/input_items?limit=1&order=asc", None),
        ("POST", "/v1/responses/input_tokens", {"input": "hello"}),
    ]


# -- messages ------------------------------------------------------------------------------------------------------


def test_a_message_is_the_official_clients(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.json(MESSAGE)
    options: dict[str, Any] = {"model": "shoal", "max_tokens": 7, "system": "Be brief.", "stop_sequences": ["a"]}
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as official:
        theirs = official.messages.create(messages=HELLO, **options)
    ours = driver.call("message", HELLO, **options)
    first, second = asked(server)
    assert first == second
    assert [dict(block) for block in ours.blocks] == [block.model_dump(exclude_unset=True) for block in theirs.content]
    assert (ours.text, ours.reasoning, ours.stop_reason) == ("Hi", "Hm", theirs.stop_reason)
    assert ours.message == {"role": "assistant", "content": MESSAGE["content"]}
    assert ours.usage == Usage(5, 3, num_cached_tokens=4)
    (call,) = ours.tool_calls
    assert call.arguments == {"city": "Rome"}
    assert call.result_block("12 C") == {"type": "tool_result", "tool_use_id": "toolu_1", "content": "12 C"}


def test_tools_and_formats_of_a_message(server: FakeServer, driver: Driver) -> None:
    server.json({**MESSAGE, "content": [{"type": "text", "text": '{"is_good": true}'}]})
    how: dict[str, Any] = {"model": "shoal", "max_tokens": 7}
    answer = driver.call("message", HELLO, tools=[weather], tool_choice="required", response_format=Mood, **how)
    assert answer.parsed == Mood(is_good=True)
    sent = server.requests[0].body
    assert sent["tools"][0].keys() == {"name", "description", "input_schema", "strict"}
    assert sent["tool_choice"] == {"type": "any"}
    assert sent["output_config"] == {"format": {"type": "json_schema", "schema": Mood.model_json_schema()}}
    with pytest.raises(UnsendableError, match="response_format of a message must be"):
        driver.call("message", HELLO, response_format={"type": "json_object"}, **how)
    server.json({"input_tokens": 12})
    assert driver.call("count_tokens", HELLO, model="shoal", tool_choice=weather) == 12
    assert server.requests[-1].body["tool_choice"] == {"type": "tool", "name": "weather"}


def message_events(input_json: str) -> list[dict[str, Any]]:
    opening = {**MESSAGE, "content": [], "stop_reason": None, "usage": MESSAGE["usage"] | {"output_tokens": 0}}
    deltas = [
        [{"type": "thinking_delta", "thinking": "Hm"}, {"type": "signature_delta", "signature": "s"}],
        [{"type": "text_delta", "text": "H"}, {"type": "text_delta", "text": "i"}],
        [{"type": "input_json_delta", "partial_json": piece} for piece in (input_json[:4], input_json[4:])],
    ]
    empty = {"thinking": "", "signature": "", "text": "", "input": {}}
    blocks = [{name: empty.get(name, value) for name, value in block.items()} for block in MESSAGE["content"]]
    events: list[dict[str, Any]] = [{"type": "message_start", "message": opening}, {"type": "ping"}]
    for index, block in enumerate(blocks):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas[index]]
        events.append({"type": "content_block_stop", "index": index})
    end = {"delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": {"output_tokens": 3}}
    return [*events, {"type": "message_delta", **end}, {"type": "message_stop"}]


def test_a_streamed_message(server: FakeServer, driver: Driver) -> None:
    how: dict[str, Any] = {"model": "shoal", "max_tokens": 7}
    events = message_events('{"city": "Rome"}')
    for _ in range(2):
        server.stream(*events, done=False)
    read: Any = driver.stream("stream_message", HELLO, **how)
    assert ("".join(one.text for one in read), "".join(one.reasoning for one in read)) == ("Hi", "Hm")
    server.json(MESSAGE)
    assert driver.whole("stream_message", HELLO, **how) == driver.call("message", HELLO, **how)

    server.stream(*message_events('{"city": "Ro'), done=False)
    assert driver.whole("stream_message", HELLO, **how).blocks[-1]["input"] == {"INVALID_JSON": '{"city": "Ro'}
    server.stream(*events[3:], done=False)
    with pytest.raises(ProtocolError):
        driver.whole("stream_message", HELLO, **how)
    server.stream(events[0], {"type": "error", "error": {"type": "api_error", "message": "no"}}, done=False)
    with pytest.raises(StreamError, match="no"):
        driver.stream("stream_message", HELLO, **how)


# -- files and batches ---------------------------------------------------------------------------------------------


def test_batches(server: FakeServer, driver: Driver) -> None:
    for status in ("validating", "completed", "cancelled"):
        server.json({**BATCH, "status": status})
    begun = driver.call("create_batch", "file-1", metadata={"a": "b"})
    batch = driver.call("batch", "batch_1")
    assert (begun.is_ended, batch.is_ended) == (False, True)
    assert (batch.request_counts.failed, batch.errors, batch.metadata) == (2, (), None)
    assert driver.call("cancel_batch", "batch_1").is_ended
    wrong = {"code": "invalid_json_line", "message": "no JSON", "line": 1}
    server.json({"data": [{**BATCH, "errors": {"data": [wrong]}}], "has_more": False, "last_id": "batch_1"})
    assert driver.call("batches", limit=1).data[0].errors == (wrong,)
    body = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert asked(server) == [
        ("POST", "/v1/batches", {**body, "metadata": {"a": "b"}}),
        ("GET", "/v1/batches/batch_1", None),
        ("POST", "/v1/batches/batch_1/cancel", None),
        ("GET", "/v1/batches?limit=1", None),
    ]

    refused = {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}}
    lines: list[dict[str, Any]] = [
        {"custom_id": "a", "response": {"status_code": 200, "body": chat_completion("hi")}, "error": None},
        {"custom_id": "b", "response": {"status_code": 200, "body": {**RESPONSE, "object": "response"}}, "error": None},
        {"custom_id": "c", "response": {"status_code": 400, "body": refused}, "error": None},
        {"custom_id": "d", "response": None, "error": {"code": "batch_expired", "message": "too late"}},
    ]
    for part in (lines[:2], lines[2:]):
        server.answer(Answer(pieces=[b"".join(json.dumps(line).encode() + b"\n" for line in part)]))
    chat, response, wrong_line, late = driver.call("batch_results", batch)
    assert (chat.answer.text, response.answer.text, chat.error) == ("hi", "Hi", None)
    assert isinstance(wrong_line.error, StatusError)
    assert (wrong_line.custom_id, wrong_line.error.status, wrong_line.error.param) == ("c", 400, "n")
    assert (late.answer, late.error.code, late.error.message) == (None, "batch_expired", "too late")


def test_files(server: FakeServer, driver: Driver) -> None:
    kept = {"id": "file-1", "bytes": 3, "created_at": 5, "filename": "a", "purpose": "batch", "status": "processed"}
    server.json(kept)
    server.json(kept)
    assert driver.call("upload", b"{}\n", filename='ä"b').id == "file-1"
    (sent,) = server.requests
    form = BytesParser(policy=HTTP).parsebytes(
        f"content-type: {sent.headers['content-type']}\r\n\r\n".encode() + sent.body
    )
    parts = [
        (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))
        for part in form.iter_parts()
    ]
    assert parts == [("purpose", b"batch"), ("file", b"{}\n")]
    file = driver.call("file", "file-1")
    assert (file.id, file.bytes, file.purpose) == ("file-1", 3, "batch")
    server.json({"data": [kept], "has_more": False, "last_id": "file-1"})
    assert driver.call("files", purpose="batch").data == (file,)
    server.answer(Answer(pieces=[b"\xff\n"]))
    assert driver.call("file_content", "file-1") == b"\xff\n"
    server.json({"id": "file-1", "deleted": True})
    assert driver.call("delete_file", "a/../b") is None
    assert asked(server)[-1] == ("DELETE", "/v1/files/a%2F..%2Fb", None)
    line = BatchLine(custom_id="a", method="POST", url="/v1/completions", body={"prompt": "\ud800"})
    with pytest.raises(UnsendableError):
        driver.call("upload", [line])


# -- the rest ------------------------------------------------------------------------------------------------------


def test_what_a_server_tells_of_itself(server: FakeServer, driver: Driver) -> None:
    can = dict.fromkeys(("chat", "tools", "reasoning", "fill_in_middle", "embeddings", "completions"), True)
    told = {"id": "shoal", "created": 5, "max_model_len": 9, "capabilities": {**can, "structured_output": False}}
    server.json({"object": "list", "data": [told]})
    assert driver.call("models") == (Model("shoal", 5, 9, Capabilities(*[True] * 6, False)),)
    server.json({"server_load": 3})
    assert driver.call("load") == 3
    server.answer(Answer())
    assert driver.call("reset_prefix_cache") is None
    server.json({"version": "1"})
    with pytest.raises(ProtocolError):
        driver.call("server_info")


@pytest.mark.parametrize(("status", "is_ready"), [(200, True), (429, False), (503, False)])
def test_whether_a_server_is_ready(server: FakeServer, driver: Driver, status: int, is_ready: bool) -> None:
    server.json({}, status=status)
    assert driver.call("ready") is is_ready
    assert asked(server) == [("GET", "/ready", None)]
