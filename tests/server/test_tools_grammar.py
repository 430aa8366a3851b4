"""Grammars of calls, with llguidance as judge: what they accept is what the reader reads."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.tools.formats import TOOL_FORMATS, ToolFormat
from shoal.server.tools.grammar import MAX_CALLS, Thought, tools_grammar
from shoal.server.tools.reader import AnswerReader
from shoal.server.wire.conversations import Tool
from tests.examples import examples

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "unit": {"enum": ["c", "f"]},
        "exact": {"type": "boolean"},
        "at": {"$ref": "#/$defs/at"},
    },
    "required": ["city", "at"],
    "$defs": {"at": {"type": "object", "properties": {"hour": {"type": "integer"}}, "required": ["hour"]}},
}
TOOLS = msgspec.convert(
    [
        {"function": {"name": "get_weather", "strict": True, "parameters": CITY}},
        {"function": {"name": "get", "parameters": {}}},
        {"function": {"name": "list", "parameters": {"type": "object", "properties": {"n": {"type": "null"}}}}},
    ],
    list[Tool],
)
SCHEMAS = {tool.function.name: tool.schema for tool in TOOLS}
VALID = {"city": 'a "數" {', "days": 2, "unit": "f", "exact": False, "at": {"hour": 3}}
LEAST = {"city": "", "at": {"hour": 0}}
EOS = 256
MARKERS = (
    "<tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁sep｜>",
    "</think>",
)
SPECIAL = {text: EOS + 1 + at for at, text in enumerate(MARKERS)}
FORMATS = sorted(TOOL_FORMATS)


class Bytes:
    """A vocabulary of bytes, end-of-text and special tokens."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>", *(text.encode() for text in special)]
        self.special_token_ids = list(range(EOS, len(self.tokens)))
        self.eos_token_id, self.bos_token_id = EOS, None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def tokenizer(has_special: bool) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Bytes(SPECIAL if has_special else {})))


def matcher(grammar: str, *, has_special: bool = False) -> LLMatcher:
    found = LLMatcher(tokenizer(has_special), grammar)
    assert not found.is_error(), found.get_error()
    return found


def tokens(text: str, special: Mapping[str, int]) -> Iterator[int]:
    for marker, token_id in special.items():
        before, found, behind = text.partition(marker)
        if found:
            yield from tokens(before, special)
            yield token_id
            yield from tokens(behind, special)
            return
    yield from text.encode()


def accepts(grammar: str, text: str, *, has_special: bool = False) -> bool:
    judge = matcher(grammar, has_special=has_special)
    token_ids = list(tokens(text, SPECIAL if has_special else {}))
    return judge.try_consume_tokens(token_ids) == len(token_ids) and judge.is_accepting()


def grammar(name: str, choice: Any = "required", *, tools: Sequence[Tool] = TOOLS, **options: Any) -> str:
    return tools_grammar(TOOL_FORMATS[name], tools, choice, **options)


# -- what is accepted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_are_calls_of_the_format(name: str, has_special: bool) -> None:
    one = TOOL_FORMATS[name]
    asked = grammar(name, special=SPECIAL if has_special else {})
    for calls in ([("get_weather", VALID)], [("get_weather", LEAST), ("get", {}), ("list", {"n": None})]):
        assert accepts(asked, one.write(calls), has_special=has_special)
    for text in ("", "Hello", f" {one.write([('get', {})])}", f"{one.write([('get', {})])} more", one.before_name):
        assert not accepts(asked, text, has_special=has_special)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "call",
    [
        ("get_weather", {"at": {"hour": 1}}),
        ("get_weather", LEAST | {"days": 0}),
        ("get_weather", LEAST | {"unit": "k"}),
        ("get_weather", LEAST | {"at": {"hour": "x"}}),
        ("get_weather", LEAST | {"other": 1}),
        ("get", {"other": 1}),
        ("unknown", {}),
    ],
)
def test_arguments_that_the_schema_refuses_are_refused(name: str, call: tuple[str, dict[str, Any]]) -> None:
    text = TOOL_FORMATS[name].write([call])
    assert not accepts(grammar(name), text)
    if call[0] == "get_weather":
        assert not accepts(grammar(name, "auto"), text)


def test_a_thought_is_followed_by_an_answer_of_the_schema_where_no_tool_may_be_called() -> None:
    for choice in ("auto", "none"):
        asked = grammar("hermes", choice, tools=[], thought="may", answer={"type": "null"})
        assert accepts(asked, "<think>Hm.</think>null") and accepts(asked, "null")
        assert not accepts(asked, "<think>Hm.</think>")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_calls_are_as_many_as_are_allowed(name: str, choice: str) -> None:
    write = TOOL_FORMATS[name].write
    assert accepts(grammar(name, choice), write([("get", {})] * MAX_CALLS))
    if choice == "required":
        assert not accepts(grammar(name), write([("get", {})] * (MAX_CALLS + 1)))
    single = grammar(name, choice, parallel=False)
    assert accepts(single, write([("get", {})]))
    assert not accepts(single, write([("get", {})] * 2))


@pytest.mark.parametrize("has_special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_free_answer_is_any_text_with_whole_calls_in_it(name: str, has_special: bool) -> None:
    one, special = TOOL_FORMATS[name], SPECIAL if has_special else {}
    asked = grammar(name, "auto", special=special)
    call = one.write([("get_weather", VALID)])
    free = ["", "Hello, {数}", call]
    if one.begins_bare:
        refused = ['{"name": "get_weather"}', "[1]", call[:-1]]
    else:
        free += [f"Hello.\n{call}", f"{call}\nDone.", f"{call} and {call}", one.begins[0][:-1] if not special else ""]
        refused = [one.begins[0], f"Use {one.begins[0]} so", call.replace("weather", "whether")]
    for text in free:
        assert accepts(asked, text, has_special=has_special), text
    for text in refused:
        assert not accepts(asked, text, has_special=has_special), text


def test_without_anything_to_demand_there_is_no_grammar() -> None:
    assert grammar("hermes", "auto", tools=TOOLS[1:]) == ""
    assert grammar("hermes", "none") == ""
    assert grammar("hermes", "auto", tools=[]) == ""


@pytest.mark.parametrize("has_special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize(
    ("thought", "accepted", "refused"),
    [
        ("never", ["{call}"], ["<think>Hm.</think>{call}"]),
        ("may", ["{call}", "<think>Hm.</think>{call}", "<think>\n<tool\n</think>\n\n{call}"], ["Hm.</think>{call}"]),
        ("begun", ["Hm.</think>{call}", "</think>\n{call}"], ["{call}", "Hm.</think>"]),
    ],
)
def test_a_thought_may_come_first(thought: Thought, accepted: list[str], refused: list[str], has_special: bool) -> None:
    asked = grammar("hermes", special=SPECIAL if has_special else {}, thought=thought)
    call = TOOL_FORMATS["hermes"].write([("get", {})])
    for text in accepted:
        assert accepts(asked, text.replace("{call}", call), has_special=has_special)
    for text in refused:
        assert not accepts(asked, text.replace("{call}", call), has_special=has_special)


def test_what_a_format_cannot_write_is_refused() -> None:
    properties = {"a>b": {"type": "string"}}
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    with pytest.raises(InvalidRequestError, match="cannot write the argument 'a>b'") as caught:
        grammar("qwen_xml", tools=msgspec.convert([tool], list[Tool]))
    assert caught.value.param == "tools"


def test_a_grammar_can_be_rolled_back() -> None:
    """Which `max_tokens` in it would forbid."""
    text = TOOL_FORMATS["hermes"].write([("get_weather", VALID)])
    for choice in ("required", "auto"):
        judge = matcher(grammar("hermes", choice))
        token_ids = list(text.encode())
        assert judge.try_consume_tokens(token_ids) == len(token_ids)
        assert judge.rollback(30) and judge.try_consume_tokens(token_ids[-30:]) == 30


# -- what is accepted is read ------------------------------------------------------------------------------------------


def walk(judge: LLMatcher, rng: random.Random, *, is_short: bool = False) -> str:
    """A text that a grammar accepts, by allowed tokens at random; what ends something is preferred."""
    texts, data = [text.encode() for text in SPECIAL], b""
    while not judge.is_stopped():
        if judge.is_accepting() and (is_short or rng.random() < 0.5):
            break
        ends = [list(end) for end in (b'"', b"}", b"</parameter>") if judge.validate_tokens(list(end)) == len(end)]
        if ends and rng.random() < 0.6:
            chosen = rng.choice(ends)
        else:
            mask = judge.compute_logit_bias()
            chosen = [rng.choice([one for one, is_allowed in enumerate(mask) if is_allowed and one != EOS])]
        assert judge.consume_tokens(chosen)
        data += b"".join(bytes([one]) if one < EOS else texts[one - EOS - 1] for one in chosen)
    return data.decode()


def read(one: ToolFormat, text: str) -> tuple[str, list[tuple[str, Any]]]:
    reader = AnswerReader(one, SCHEMAS)
    content, calls = "", list[list[str]]()
    for said in (reader.feed(text), reader.finish()):
        content += said.content
        for piece in said.calls:
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def is_valid(name: str, arguments: dict[str, Any]) -> bool:
    """What the schemas above say, in Python."""
    if name != "get_weather":
        return arguments == {} or (name == "list" and arguments == {"n": None})
    checks = {
        "city": lambda value: isinstance(value, str),
        "days": lambda value: isinstance(value, int) and value >= 1,
        "unit": lambda value: value in ("c", "f"),
        "exact": lambda value: isinstance(value, bool),
        "at": lambda value: isinstance(value["hour"], int),
    }
    return LEAST.keys() <= arguments.keys() and all(checks[key](value) for key, value in arguments.items())


@settings(max_examples=examples(100), deadline=None)
@given(name=st.sampled_from(FORMATS), seed=st.integers(0, 2**32), has_special=st.booleans(), parallel=st.booleans())
def test_what_is_demanded_is_read_as_calls_that_match(name: str, seed: int, has_special: bool, parallel: bool) -> None:
    asked = grammar(name, special=SPECIAL if has_special else {}, parallel=parallel)
    text = walk(matcher(asked, has_special=has_special), random.Random(seed))
    content, calls = read(TOOL_FORMATS[name], text)
    assert content == ""
    assert 1 <= len(calls) <= (MAX_CALLS if parallel else 1)
    assert all(is_valid(*call) for call in calls)


@settings(max_examples=examples(60), deadline=None)
@given(name=st.sampled_from(FORMATS), seed=st.integers(0, 2**32))
def test_what_begins_in_a_free_answer_is_read_as_a_call_that_matches(name: str, seed: int) -> None:
    one, judge = TOOL_FORMATS[name], matcher(grammar(name, "auto", tools=TOOLS[:1]))
    begun = "{" if one.begins_bare else one.begins[0]
    assert judge.consume_tokens(list(begun.encode()))
    content, calls = read(one, begun + walk(judge, random.Random(seed), is_short=True))
    assert content == "" and calls and all(is_valid(*call) for call in calls)
