from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.parsing import parse_body
from shoal.server.wire.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.examples import examples

USER = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({"prompt": "a"} | fields).encode())


def chat(**fields: Any) -> ChatBody:
    return parse_body(ChatBody, json.dumps({"messages": USER} | fields).encode())


def fault(kind: Any, raw: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(kind, raw)
    return caught.value


def test_the_defaults_are_openais() -> None:
    body = completion()
    assert (body.n, body.stream, body.echo, body.logprobs, body.max_tokens, body.seed) == (
        1,
        False,
        False,
        None,
        None,
        None,
    )
    assert (body.temperature, body.top_p, body.presence_penalty, body.frequency_penalty) == (None, None, 0.0, 0.0)
    assert body.stop_strings == []
    assert chat().top_logprobs is None


def test_null_is_the_same_as_nothing_where_openai_says_so() -> None:
    names = ("model", "stream_options", "max_tokens", "temperature", "top_p", "logit_bias", "seed", "stop", "user")
    assert completion(**dict.fromkeys((*names, "logprobs", "best_of", "suffix"))) == completion()
    assert chat(**dict.fromkeys((*names, "max_completion_tokens", "tools", "tool_choice", "response_format"))) == chat()


def test_null_is_the_same_as_nothing_where_others_say_so() -> None:
    """Frameworks send null for what their users did not set, of fields that have a default, or are unknown here."""
    names = ("n", "stream", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos", "functions", "audio")
    assert chat(**dict.fromkeys(names)) == chat()
    with pytest.raises(InvalidRequestError, match="temperature") as caught:
        chat(**dict.fromkeys(names) | {"temperature": 3})
    assert caught.value.param == "temperature"
    with pytest.raises(InvalidRequestError, match="messages: expected a list, got null"):
        parse_body(ChatBody, b'{"messages": null}')


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a", 1), ("", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2], [3]], 3), ([], 1), ([[]], 1)],
)
def test_prompts_of_every_kind(prompt: Any, count: int) -> None:
    assert completion(prompt=prompt).prompt == prompt
    assert completion(prompt=prompt).num_prompts == count


def test_stop_strings_are_one_or_many() -> None:
    assert completion(stop="a").stop_strings == ["a"]
    assert completion(stop=["a", "b"]).stop_strings == ["a", "b"]
    assert completion(stop=[]).stop_strings == []


def test_messages_for_the_template() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts, "name": "x"}, {"role": "assistant", "content": None}]
    assert [message.for_template() for message in chat(messages=messages).messages] == [
        {"role": "system", "content": "ab", "name": "x"},
        {"role": "assistant", "content": ""},
    ]


def test_what_asks_for_nothing_is_accepted() -> None:
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    chat(**nothing, parallel_tool_calls=True, metadata={"a": 1}, store=False, service_tier="auto", user="me")
    completion(best_of=1, suffix="")


def test_a_fault_names_the_field_and_the_limit() -> None:
    assert fault(CompletionBody, b'{"prompt": "a", "n": 0}').param == "n"
    assert fault(CompletionBody, b"{}").message == "missing required field: prompt"
    error = fault(ChatBody, b'{"messages": [{"role": "user", "content": "a", "colour": 1}]}')
    assert error.message == "unrecognized request argument: messages[0].colour"
    assert error.param == "messages"
    assert "length <= 16" in fault(CompletionBody, json.dumps({"prompt": "a", "stop": ["a"] * 17}).encode()).message


@pytest.mark.parametrize("raw", [b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "seed": Infinity}'])
def test_what_is_no_number_is_no_json(raw: bytes) -> None:
    assert "not valid JSON" in fault(CompletionBody, raw).message


MANY = 1_000_000
HUGE: list[tuple[Any, dict[str, Any]]] = [
    (CompletionBody, {"prompt": [None] * MANY}),
    (CompletionBody, {"prompt": [1] * MANY + ["a"]}),
    (CompletionBody, {"prompt": [[None]] * MANY}),
    (CompletionBody, {"prompt": "a", "stop": [""] * MANY}),
    (CompletionBody, {"prompt": "a", "logit_bias": {str(number): "x" for number in range(MANY // 16)}}),
    (CompletionBody, {"prompt": "a"} | {f"x{number}": 1 for number in range(MANY // 16)}),
    (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (ChatBody, {"messages": [{"role": "user"} | {f"x{number}": 1 for number in range(MANY // 16)}]}),
    (ChatBody, {"messages": USER, "modalities": [1] * MANY}),
]


@pytest.mark.parametrize(("kind", "body"), HUGE)
def test_a_million_faults_are_described_as_one(kind: Any, body: dict[str, Any]) -> None:
    """Each would be an object in memory, and to describe them would delay all requests."""
    error = fault(kind, json.dumps(body).encode())
    cause = error.__cause__
    assert len(error.message) < 200 and len(str(cause)) < 2000


@pytest.mark.parametrize(
    "field", ["top_k", "max_tokens", "min_tokens", "end_after", "seed", "n", "priority", "logprobs"]
)
@pytest.mark.parametrize("value", [2**64, -(2**64), 10**30])
def test_every_integer_fits_the_engine(field: str, value: int) -> None:
    error = fault(CompletionBody, json.dumps({"prompt": "a", field: value}).encode())
    assert error.param == field
    assert error.message.startswith(f"{field}: expected an integer")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
)
kinds = st.sampled_from([CompletionBody, ChatBody, TokenizeBody, DetokenizeBody])


@settings(max_examples=examples(500))
@given(kind=kinds, raw=st.binary(max_size=40) | anything.map(lambda value: json.dumps(value).encode()))
def test_anything_is_read_or_refused(kind: Any, raw: bytes) -> None:
    try:
        body = parse_body(kind, raw)
    except InvalidRequestError as error:
        assert error.message
    else:
        assert isinstance(body, kind)


@settings(max_examples=examples(500))
@given(field=st.sampled_from([*CompletionBody.__struct_fields__]), value=anything)
def test_a_fault_in_a_field_is_said_of_that_field(field: str, value: Any) -> None:
    try:
        completion(**{field: value})
    except InvalidRequestError as error:
        assert error.param == field
        assert error.message
