"""What a chat template says of tools, and what it is given."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models

from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import InvalidRequestError
from shoal.server.rendering import Conversation
from shoal.server.settings import declared
from shoal.server.tools.dialect import Dialect, find_dialect
from shoal.server.tools.formats import TOOL_FORMATS
from shoal.server.wire.conversations import MAX_DEPTH
from shoal.server.wire.parsing import read_body
from shoal.server.wire.requests import ChatBody

# What tells them apart in the templates of these models.
TEMPLATES = {
    "hermes": "<tools>{{ tools }}</tools> return a json object within <tool_call></tool_call> XML tags",
    "qwen_xml": "{{ tools }}<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>",
    "llama3": "<|start_header_id|>{{ tools }}respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}',
    "mistral": '[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS]{{ "[TOOL_CALLS] [" }}{{ message.tool_calls }}',
    "mistral_args": '[AVAILABLE_TOOLS]{{ tools }}{{ "[TOOL_CALLS]" + name + "[ARGS]" + arguments }}',
    "deepseek": "{{ message['tool_calls'] }}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] }}"
    "{{ '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' }}",
    "deepseek_v31": "{{ message['tool_calls'] }}{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' }}",
    "json": "Available tools: {{ tools }}",
}
SAID: list[dict[str, Any]] = [
    {"role": "user", "content": "Wetter?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"ort": "Köln"}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "1"},
    {"role": "tool", "tool_call_id": "b", "content": "2"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "Ünicode"}}]


def tokenizer(template: str, **others: str) -> Tokenizer:
    hub = HubTokenizer(models.BPE({"a": 0}, []))
    hub.decoder = decoders.ByteLevel()
    hub.add_special_tokens(["<tool_call>", "[TOOL_CALLS]", "<|other|>"])
    return Tokenizer(hub, chat_templates={"default": template, **others})


def dialect(template: str, tool_format: str = "auto", reasoning_format: str = "auto") -> Dialect:
    return find_dialect(tokenizer(template), tool_format, reasoning_format)


def body(**fields: Any) -> ChatBody:
    return read_body(ChatBody, {"messages": SAID} | fields)


def rendered(template: str, **fields: Any) -> str:
    asked = body(**fields)
    given = dialect(template).conversation(
        asked.messages, tools=asked.offered_tools, variables=asked.template_variables
    )
    return render(template, given)


def render(template: str, given: Conversation) -> str:
    return tokenizer(template).chat_template.render(
        given.messages, add_generation_prompt=given.add_generation_prompt, tools=given.tools, **given.variables
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_template_says_how_calls_are_written(name: str) -> None:
    assert dialect(TEMPLATES[name]).tool_format.name == name
    assert dialect(TEMPLATES[name], "hermes").tool_format.name == "hermes"


def test_every_format_has_a_setting_and_a_template() -> None:
    names = declared()["server"]["tool_format"].type.__args__
    assert sorted(names) == sorted([*TOOL_FORMATS, "auto"]) == sorted([*TEMPLATES, "auto"])


def test_a_template_of_its_own_for_tools_counts() -> None:
    assert find_dialect(tokenizer("plain", tool_use=TEMPLATES["mistral"]), "auto", "auto").tool_format.name == "mistral"


def test_a_template_that_knows_no_tools_gets_them_as_text() -> None:
    plain = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    found = dialect(plain)
    assert (found.tool_format.name, found.shows_tools, found.shows_calls, found.thinks) == (
        "hermes",
        False,
        False,
        False,
    )
    call = TOOL_FORMATS["hermes"].write([("f", {"ort": "Köln"})])
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    asked = f"[user]Wetter?[assistant]{call}[user]{results}"
    assert rendered(plain) == asked
    told = rendered(plain, tools=TOOLS)
    assert told.startswith("[system]You can call tools.") and told.endswith(asked) and "Ünicode" in told
    system = [{"role": "system", "content": "Be brief."}, *SAID]
    assert rendered(plain, tools=TOOLS, messages=system).startswith("[system]Be brief.\n\nYou can call tools.")
    assert rendered(plain, tools=TOOLS, tool_choice="none") == asked


def test_a_template_that_shows_calls_alone_gets_the_tools_as_text() -> None:
    """As that of DeepSeek R1, which joins the arguments to text, and tells a message of calls by its null content."""
    template = (
        "{% for message in messages %}{% if message['content'] is none %}"
        "{% for tool in message['tool_calls'] %}"
        "{{ '<' + tool['function']['name'] + ':' + tool['function']['arguments'] + '>' }}"
        "{% endfor %}{% else %}({{ message['content'] }}){% endif %}{% endfor %}"
    )
    assert rendered(template) == '(Wetter?)<f:{"ort": "Köln"}>(1)(2)'
    assert rendered(template, tools=TOOLS).startswith("(You can call tools.")


def test_arguments_are_an_object_and_text() -> None:
    template = (
        "{% for call in messages[1].tool_calls %}{% set args = call.function.arguments %}{{ args is mapping }}"
        "{{ args.ort }}{{ args | tojson }}{{ args }}{{ 'x' ~ args }}{{ args + 'y' }}{% endfor %}"
    )
    text = '{"ort": "Köln"}'
    assert rendered(template) == f"TrueKöln{text}{text}x{text}{text}y"


@pytest.mark.parametrize("arguments", ["", "{}", {}, '{"a": ', "[1]"])
def test_arguments_may_be_anything(arguments: Any) -> None:
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    shown = rendered("{{ messages[0].tool_calls[0].function.arguments }}", messages=messages)
    assert shown == (arguments or "{}" if isinstance(arguments, str) else "{}")


def test_arguments_that_are_too_deep_are_refused() -> None:
    deep = '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1)
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}]
    with pytest.raises(InvalidRequestError, match="deep") as caught:
        dialect("tools").conversation(body(messages=messages).messages)
    assert caught.value.param == "messages"


def test_special_tokens_are_shown_to_those_who_read_them() -> None:
    for name, special in (("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]")):
        found = dialect(TEMPLATES[name])
        assert list(found.special) == [special]
        assert found.shown(body(tools=TOOLS)) == frozenset(found.special.values())
        assert found.shown(body()) == frozenset()


@pytest.mark.parametrize(
    ("prompt", "grammar"),
    [
        ("a", '("<think>" thought GAP?)?'),
        ("a<think>\n", "thought GAP?"),
        ("<think></think>", '("<think>" thought GAP?)?'),
    ],
)
def test_the_prompt_may_begin_the_thought(prompt: str, grammar: str) -> None:
    found = dialect(TEMPLATES["json"] + "<think></think>")
    asked = body(tools=TOOLS, tool_choice="required")
    assert found.grammar(asked, prompt, None).startswith(f"start: {grammar} first")
    assert found.grammar(body(), prompt, {"type": "null"}).startswith(f"start: {grammar} answer")
    assert found.reading(asked, prompt).is_thinking == prompt.rstrip().endswith("<think>")


@pytest.mark.parametrize(
    ("fields", "knows", "knows_none"),
    [
        ({"tool_choice": "required"}, True, False),
        ({"tool_choice": "required", "parallel_tool_calls": True}, True, True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, False, False),
        ({"tool_choice": {"function": {"name": "f"}}}, False, False),
        ({"tool_choice": {"function": {"name": "f"}}, "parallel_tool_calls": True}, True, True),
    ],
)
def test_who_may_call_several_times_at_once(fields: dict[str, Any], knows: bool, knows_none: bool) -> None:
    for template, takes_several in ((TEMPLATES["hermes"], knows), ("{{ messages }}", knows_none)):
        grammar = dialect(template).grammar(body(tools=TOOLS, **fields), "", None)
        assert ("{0," in grammar) == takes_several


def one_of(*names: str, mode: str = "required") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "names", "must"),
    [
        ("required", "fgh", True),
        ({"type": "function", "function": {"name": "g"}}, "g", True),
        (one_of("h", "f"), "fh", True),
        (one_of("h", "f", mode="auto"), "fh", False),
    ],
)
def test_some_of_the_tools_may_be_called(choice: Any, names: str, must: bool) -> None:
    """The model is told of all, so that the prompt stays the same."""
    tools = [TOOLS[0] | {"function": TOOLS[0]["function"] | {"name": name, "strict": True}} for name in "fgh"]
    asked, found = body(tools=tools, tool_choice=choice), dialect(TEMPLATES["hermes"])
    assert [tool.function.name for tool in asked.offered_tools] == ["f", "g", "h"]
    grammar = found.grammar(asked, "", None)
    assert [name for name in "fgh" if f'\\"name\\": \\"{name}\\"' in grammar] == list(names)
    assert grammar.startswith("start: section*") != must
    reader = found.reading(asked, "").reader()
    assert reader is not None
    said = reader.feed('<tool_call>{"name": "g", "arguments": {}}</tool_call>')
    assert bool(said.calls) == ("g" in names)


def test_a_model_that_knows_no_tools_answers_by_a_schema_after_a_result() -> None:
    schema, asked = {"type": "null"}, body(tools=TOOLS, messages=SAID[:1])
    knows, knows_none = dialect(TEMPLATES["hermes"]), dialect("{{ messages }}")
    assert "{0," in knows.grammar(asked, "", schema) == knows.grammar(body(tools=TOOLS), "", schema)
    assert knows_none.grammar(asked, "", schema).startswith("start: (first | answer)")
    assert knows_none.grammar(body(tools=TOOLS), "", schema) == ""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "none", "enable_thinking": True},
        ),
    ],
)
def test_variables_of_the_template(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert body(**fields).template_variables == expected
