"""What models say, read: in every format, in any pieces, with nothing lost."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.tools.brackets import Brackets
from shoal.server.tools.formats import TOOL_FORMATS
from shoal.server.tools.reader import MAX_HEAD_CHARS, AnswerReader, Said
from tests.examples import examples

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "raw": {}, "where": {"type": "object"}},
}
SCHEMAS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "f": {"type": "object"}}
PARIS = {"city": "Paris"}


@dataclass
class Answer:
    """All that was said, put together as a client does."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, said: Said) -> None:
        self.reasoning += said.reasoning
        self.content += said.content
        for piece in said.calls:
            if piece.id is not None:
                assert piece.index == len(self.calls) and piece.arguments == "" and piece.name
                self.calls.append((piece.name, ""))
                self.ids.append(piece.id)
            else:
                assert piece.name is None and piece.index == len(self.calls) - 1 and piece.arguments
                name, arguments = self.calls[-1]
                self.calls[-1] = (name, arguments + piece.arguments)

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def read(tool_format: str, text: str, cuts: list[int] | None = None, **options: Any) -> Answer:
    reader = AnswerReader(TOOL_FORMATS[tool_format], SCHEMAS, **options)
    answer = Answer()
    bounds = [0, *sorted(cut for cut in cuts or [] if cut <= len(text)), len(text)]
    for start, end in itertools.pairwise(bounds):
        answer.add(reader.feed(text[start:end]))
    answer.add(reader.finish())
    assert reader.num_calls == len(answer.calls)
    return answer


CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
DEEPSEEK_CALL = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + '{"city": "Paris"}\n```<｜tool▁call▁end｜>'
)
DEEPSEEK_V31_CALL = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
XML_CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
# What such models write: the format, the text, the content, and how many calls of Paris.
SAMPLES = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "", 2),
    ("hermes", f"I will look.\n\n<tool_call>\n{CALL}\n</tool_call>", "I will look.", 1),
    ("hermes", f"<tool_call>{CALL}</tool_call> Done.", "Done.", 1),
    ("hermes", f"<tool_call>\n{CALL[:-1]}\n</tool_call>", "", 1),  # a brace is forgotten
    ("hermes", f"<tool_call>\n{CALL}\n", "", 1),  # so is the end
    ("hermes", '<tool_call>\n{"arguments": {"city": "Paris"}, "name": "get_weather"}\n</tool_call>', "", 1),
    ("hermes", '<tool_call>{"name": "get_weather", "parameters": {"city": "Paris"}}</tool_call>', "", 1),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", 1),
    ("hermes", f'<tool_call>{{"type": "function", "function": {CALL}}}</tool_call>', "", 1),
    ("hermes", f'<tool_call>{CALL[:-1]}, "id": "call_1"}}</tool_call>', "", 1),
    ("qwen_xml", XML_CALL, "", 1),
    ("qwen_xml", f"Let me see.\n{XML_CALL}\n{XML_CALL}", "Let me see.", 2),
    ("qwen_xml", XML_CALL.replace("\nParis\n", "Paris"), "", 1),
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", 1),
    ("llama3", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}<|eom_id|>', "", 1),
    ("llama3", f"{CALL}; {CALL}", "", 2),
    ("llama3", f'{{"type": "function", {CALL[1:]}', "", 1),
    ("mistral", f"[TOOL_CALLS] [{CALL}]", "", 1),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", 2),
    ("mistral", f'Sure.[TOOL_CALLS] [{CALL[:-1]}, "id": "VvvODy9mT"}}]', "Sure.", 1),
    ("mistral_args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", 1),
    ("mistral_args", '[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]{"city": "Paris"}', "", 1),
    ("mistral_args", '[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_weather{"city": "Paris"}', "", 2),
    ("deepseek", f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}<｜tool▁calls▁end｜>", "", 1),
    ("deepseek", f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}\n{DEEPSEEK_CALL}<｜tool▁calls▁end｜>", "", 2),
    ("deepseek_v31", f"Yes.<｜tool▁calls▁begin｜>{DEEPSEEK_V31_CALL * 2}<｜tool▁calls▁end｜>", "Yes.", 2),
    ("json", CALL, "", 1),
    ("json", f"[{CALL}, {CALL}]", "", 2),
    ("json", f" {CALL}\n{CALL}\n", "", 2),
    ("json", f"{CALL}, and more", ", and more", 1),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "num_calls"), SAMPLES)
def test_what_models_write_is_read(tool_format: str, text: str, content: str, num_calls: int) -> None:
    for cuts in ([], list(range(len(text)))):
        answer = read(tool_format, text, cuts)
        assert answer.parsed == [("get_weather", PARIS)] * num_calls
        assert (answer.content, answer.reasoning) == (content, "")
        assert len(set(answer.ids)) == num_calls


NO_CALLS = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\n"),
    ("hermes", "Use <tool_call> tags.  <tool_c"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {"city": "Paris"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": oops {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5}</tool_call>'),
    ("hermes", CALL),
    ("qwen_xml", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
    ("qwen_xml", "<tool_call>\n<function=get_weather"),
    ("llama3", f"As JSON: {CALL}"),
    ("llama3", '{"name": "Paris", "population": {"2020": 2145906}}'),
    ("llama3", '{"name": "get_weather", "parameters": {'[:-1]),
    ("llama3", "[1, 2]"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral_args", "[TOOL_CALLS]get_weather"),
    ("mistral_args", "[TOOL_CALLS]" + "a" * MAX_HEAD_CHARS + "{}"),
    ("mistral_args", "[TOOL_CALLS]unknown[ARGS]{}"),
    ("deepseek", "<｜tool▁calls▁begin｜>get lost {}<｜tool▁calls▁end｜>"),
    ("json", "[5]"),
    ("json", "[ {"),
    ("json", '{"a": [{"b": "}"}]} and so on'),
    ("json", "plain"),
]


@pytest.mark.parametrize(("tool_format", "text"), NO_CALLS)
def test_what_looks_like_a_call_and_is_none_stays_as_it_is(tool_format: str, text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        answer = read(tool_format, text, cuts)
        assert (answer.content, answer.calls) == (text, [])


@pytest.mark.parametrize("tool_format", sorted(TOOL_FORMATS))
def test_what_a_format_writes_is_read(tool_format: str) -> None:
    arguments = {"city": 'a "b" \\ {\n数', "days": 3, "where": {"x": [1, {"y": "}"}]}}
    text = TOOL_FORMATS[tool_format].write([("get_weather", arguments), ("f", {}), ("get_weather", {})])
    answer = read(tool_format, text)
    assert answer.parsed == [("get_weather", arguments), ("f", {}), ("get_weather", {})]
    assert answer.content == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("<parameter=city>\n5\n</parameter>", {"city": "5"}),
        ("<parameter=city>\n\n a\n\n</parameter>", {"city": "\n a\n"}),
        ("<parameter=city>\n</parameter>", {"city": ""}),
        ("<parameter=days>\n5\n</parameter>", {"days": 5}),
        ("<parameter=days>\nfive\n</parameter>", {"days": "five"}),
        ("<parameter=raw>\nTrue\n</parameter>", {"raw": True}),
        ("<parameter=raw>\nNone\n</parameter>", {"raw": None}),
        (
            '<parameter=where>\n{"a": [1]}\n</parameter><parameter=new>\n1.5\n</parameter>',
            {"where": {"a": [1]}, "new": 1.5},
        ),
        ('<parameter=where>\n{"a": "</parameter>"}\n</parameter>', {"where": {"a": "</parameter>"}}),
        ('<parameter=raw>\n"</parameter>"\n</parameter>', {"raw": "</parameter>"}),
        ('<parameter=raw>\n{"a\n</parameter><parameter=days>\n1\n</parameter>', {"raw": '{"a', "days": 1}),
        ("", {}),
    ],
)
def test_arguments_between_tags_have_the_types_of_the_schema(value: str, expected: dict[str, Any]) -> None:
    text = f"<tool_call>\n<function=get_weather>\n{value}\n</function>\n</tool_call>"
    for cuts in ([], list(range(len(text)))):
        assert read("qwen_xml", text, cuts).parsed == [("get_weather", expected)]


@pytest.mark.parametrize(
    ("tool_format", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', '{"a": "b'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b\\', '{"a": "b\\'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),
        ("mistral_args", "[TOOL_CALLS]f[ARGS]{", "{"),
        ("qwen_xml", "<tool_call><function=f><parameter=a>\n1\n</parameter>\n<parameter=b>\nx", '{"a": 1, "b": "x'),
        ("qwen_xml", "<tool_call><function=f><parameter=a", '{"a'),
        ("qwen_xml", "<tool_call><function=f>", ""),
    ],
)
def test_a_call_that_is_cut_off_tells_what_came(tool_format: str, text: str, arguments: str) -> None:
    for cuts in ([], list(range(len(text)))):
        answer = read(tool_format, text, cuts)
        assert (answer.content, answer.calls) == ("", [("f", arguments)])


def test_arguments_are_told_as_they_come() -> None:
    reader = AnswerReader(TOOL_FORMATS["hermes"], SCHEMAS)
    assert reader.feed('<tool_call>\n{"name": "f", "arguments": ').calls == []
    first, second = reader.feed('{"a').calls
    assert (first.name, first.arguments, second.arguments) == ("f", "", '{"a')
    assert [piece.arguments for piece in reader.feed('": 1').calls] == ['": 1']


def test_a_further_call_is_content_where_one_is_allowed() -> None:
    answer = read("hermes", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", max_calls=1)
    assert answer.parsed == [("get_weather", PARIS)]
    assert answer.content == f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "options", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", {}, "Hm.", "Yes."),
        ("Hm.\n</think>\n\nYes.", {"is_thinking": True}, "Hm.", "Yes."),
        ("\n<think></think>Yes.", {}, "", "Yes."),
        ("<think>Hm. ", {}, "Hm. ", ""),
        ("Yes <think>no</think>.", {}, "", "Yes <think>no</think>."),
        ("<thin", {}, "", "<thin"),
        (f"<think>Hm.</think>\n<tool_call>{CALL}</tool_call>", {}, "Hm.", ""),
    ],
)
def test_thoughts_are_kept_apart(text: str, options: dict[str, Any], reasoning: str, content: str) -> None:
    for cuts in ([], list(range(len(text)))):
        answer = read("hermes", text, cuts, thinks=True, **options)
        assert (answer.reasoning, answer.content) == (reasoning, content)
        assert len(answer.calls) == text.count("<tool_call>")


def test_without_tools_nothing_is_read_as_a_call() -> None:
    reader = AnswerReader(None, {}, thinks=True)
    assert reader.feed("<think>a</think>b <tool_call>").content == "b <tool_call>"
    assert reader.finish().content == ""


@pytest.mark.parametrize(("tool_format", "length"), [("mistral", 9), ("mistral_args", 9), ("hermes", 29)])
def test_ids_are_as_templates_want_them(tool_format: str, length: int) -> None:
    text = TOOL_FORMATS[tool_format].write([("f", {})] * 3)
    ids = read(tool_format, text).ids
    assert len(set(ids)) == 3 and all(re.fullmatch(rf"[a-zA-Z0-9_]{{{length}}}", one) for one in ids)


FRAGMENTS = sorted(
    {text for one in TOOL_FORMATS.values() for text in one.texts if text}
    | {CALL, CALL[:20], CALL[20:], DEEPSEEK_CALL, DEEPSEEK_V31_CALL, XML_CALL, XML_CALL[:40], XML_CALL[40:]}
    | {*'{}[],;"\\ \n:', "get_weather", '"f"', "text", "数", "<think>", "</think>", "<parameter=a>", "</parameter>"}
)


@settings(max_examples=examples(1500))
@given(
    tool_format=st.sampled_from(sorted(TOOL_FORMATS)),
    fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=12),
    cuts=st.lists(st.integers(0, 200)),
    options=st.sampled_from([{}, {"max_calls": 1}, {"thinks": True}, {"thinks": True, "is_thinking": True}]),
)
def test_streamed_is_whole(tool_format: str, fragments: list[str], cuts: list[int], options: dict[str, Any]) -> None:
    """However a text is cut, it is read alike; and without calls and thoughts all of it is content."""
    text = "".join(fragments)
    whole, pieces, letters = (read(tool_format, text, cuts, **options) for cuts in ([], cuts, list(range(len(text)))))
    for other in (pieces, letters):
        assert (other.reasoning, other.content, other.calls) == (whole.reasoning, whole.content, whole.calls)
    if not whole.calls and not options.get("thinks"):
        assert whole.content == text


VALUES = st.none() | st.integers() | st.text('ab{}[]"\\ \n数', max_size=8) | st.lists(st.integers(), max_size=2)


@settings(max_examples=examples(300))
@given(
    tool_format=st.sampled_from(sorted(set(TOOL_FORMATS) - {"qwen_xml"})),
    before=st.text("ab数 .,;\n]}`", max_size=10).map(str.strip),
    calls=st.lists(
        st.tuples(
            st.sampled_from(sorted(SCHEMAS)),
            st.dictionaries(st.text('ab"{', max_size=3), VALUES | st.dictionaries(st.just("k"), VALUES), max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    cuts=st.lists(st.integers(0, 300)),
)
def test_any_calls_behind_any_text(tool_format: str, before: str, calls: list[Any], cuts: list[int]) -> None:
    one = TOOL_FORMATS[tool_format]
    if one.begins_bare:
        before = ""
    answer = read(tool_format, before + one.write(calls), cuts)
    assert answer.content == before
    assert answer.parsed == calls


@settings(max_examples=examples(300))
@given(value=VALUES | st.dictionaries(st.just('{"'), VALUES), cut=st.integers(0, 100))
def test_brackets_find_the_end_of_a_value(value: Any, cut: int) -> None:
    written = json.dumps([value])
    text, brackets = f"{written}]}}", Brackets()
    bound = cut % len(text)
    for part in (text[:bound], text):
        while brackets.next(part):
            if brackets.depth == 0:
                assert text[: brackets.position] == written
                return
    raise AssertionError("no end was found")


def test_a_long_answer_is_read_in_linear_time() -> None:
    """Letter by letter, as tokens come: a text that never ends to look like calls."""
    for tool_format, part in (("hermes", "<tool_call>{"), ("json", '{"a":'), ("mistral_args", "[TOOL_CALLS]a")):
        text = part * 4000
        answer = read(tool_format, text, list(range(0, len(text), 3)))
        assert answer.content == text
