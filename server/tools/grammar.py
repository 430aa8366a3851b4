"""Grammars that demand calls of tools, in the Lark of llguidance.

A required call has nothing around it but a thought.  Where the model is free to call, any text may stand there, and
what begins a call is followed by a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.schemas import demanded, listed, property_schemas, takes_type
from shoal.server.tools.formats import PARAMETER_BEGIN, PARAMETER_END, ToolFormat
from shoal.server.tools.reader import THINK, THINK_END
from shoal.server.wire.conversations import Tool, ToolMode

MAX_CALLS = 16  # that a grammar allows in one answer: a model that cannot stop would fill the context

# Whether an answer has a thought before it: never, if the model likes, or begun by the prompt.
Thought = Literal["never", "may", "begun"]


def tools_grammar(
    tool_format: ToolFormat,
    tools: Sequence[Tool],
    mode: ToolMode,
    *,
    parallel: bool = True,
    special: Mapping[str, int] | None = None,
    thought: Thought = "never",
    answer: Mapping[str, Any] | None = None,
) -> str:
    """The grammar of answers in which calls are as they should be; empty if the model is free.

    Args:
        answer: a schema, of which an answer without calls is.
        parallel: whether an answer may have several calls.
        special: the special tokens among the texts of the format and the tags of thoughts, by their text.

    Raises:
        InvalidRequestError: the format cannot write the arguments of a tool.
    """
    if mode == "none" or (mode == "auto" and answer is None and not any(tool.function.strict for tool in tools)):
        tools = []
    if not tools and (answer is None or thought == "never"):
        return ""
    is_free = mode in ("auto", "none")
    return _Grammar(tool_format, tools, parallel, special or {}).text(is_free, thought, answer)


class _Grammar:
    """The rules, written one by one."""

    def __init__(
        self, tool_format: ToolFormat, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]
    ) -> None:
        self._format = tool_format
        self._tools = tools
        self._special = special
        self._max_calls = MAX_CALLS if parallel else 1
        self._rules = ["TEXT: /(.|\\n)*/"]

    def text(self, is_free: bool, thought: Thought, answer: Mapping[str, Any] | None) -> str:
        is_text = is_free and answer is None
        for number, tool in enumerate(self._tools):
            self._add(f"args_{number}", self._arguments(number, tool, is_text))
        said = self._free() if is_text else self._section("") if self._tools else ""
        if is_free and answer is not None:
            written = self._add("answer", f"%json {demanded(answer)}")
            said = f"({said} | {written})" if said else written
        if thought != "never":
            said = f"{self._thought(thought)} {said}"
        return "\n".join([f"start: {said}", *self._rules]) + "\n"

    def _add(self, name: str, rule: str) -> str:
        self._rules.append(f"{name}: {rule}")
        return name

    def _literal(self, text: str) -> str:
        """The text as the grammar has it, special tokens by their ids."""
        for special, token_id in self._special.items():
            before, found, behind = text.partition(special)
            if found:
                return f"{self._literal(before)} <[{token_id}]> {self._literal(behind)}".strip()
        return json.dumps(text) if text else ""

    def _ends_with(self, name: str, marker: str) -> str:
        """A rule: any text up to a marker and the marker."""
        if marker in self._special:
            return self._add(name, f"TEXT {self._literal(marker)}")
        return self._add(f"{name}[lazy]", f"TEXT {json.dumps(marker)}").removesuffix("[lazy]")

    def _thought(self, thought: Thought) -> str:
        self._add("GAP", "/\\n{1,2}/")
        rest = f"{self._ends_with('thought', THINK_END)} GAP?"
        return rest if thought == "begun" else f"({self._literal(THINK)} {rest})?"

    def _free(self) -> str:
        """Any text, and sections of calls in it where the format has a marker for them; else either of both."""
        if self._format.begins_bare:
            self._add("PLAIN", "/[^ \\t\\r\\n\\[{](.|\\n)*/")
            return f"(PLAIN | {self._section('')})?"
        begin = self._format.begins[0]
        section = self._add("section", f"{self._ends_with('begin', begin)} {self._section(begin)}")
        return f"{section}* TEXT" if self._max_calls > 1 else f"({section} | TEXT)"

    def _section(self, begun: str) -> str:
        """The calls of an answer, but for what has begun them."""
        opening = self._format.opening.removeprefix(begun)
        first = self._calls("first", "" if self._format.opening else begun)
        others = ""
        if self._max_calls > 1:
            call = self._calls("call", "")
            others = f"({self._literal(self._format.between)} {call}){{0,{self._max_calls - 1}}}"
        return " ".join(filter(None, [self._literal(opening), first, others, self._literal(self._format.closing)]))

    def _calls(self, name: str, begun: str) -> str:
        """A rule: a call of any of the tools, but for what has begun it."""
        after = self._literal(self._format.after_arguments)
        calls = []
        for number, tool in enumerate(self._tools):
            before = f"{self._format.before_name}{tool.function.name}{self._format.before_arguments}"
            calls.append(f"{self._literal(before.removeprefix(begun))} args_{number} {after}")
        return self._add(name, " | ".join(calls))

    # -- arguments -------------------------------------------------------------------------------------------------

    def _arguments(self, number: int, tool: Tool, is_free: bool) -> str:
        schema = tool.schema if tool.function.strict or not is_free else {"type": "object"}
        if self._format.shape != "xml":
            return f"%json {demanded(schema)}"
        required = listed(schema, "required")
        parameters = []
        for at, (name, one) in enumerate(property_schemas(tool.schema).items()):
            if ">" in name or "\n" in name:
                raise InvalidRequestError(f"tools: the model cannot write the argument {name!r}", param="tools")
            value = self._parameter(f"p_{number}_{at}", name, one)
            parameters.append(value if name in required else f"{value}?")
        return " ".join(parameters) or '""'

    def _parameter(self, rule: str, name: str, schema: Any) -> str:
        begin, end = self._literal(f"{PARAMETER_BEGIN}{name}>\n"), json.dumps(f"\n{PARAMETER_END}\n")
        values = [*listed(schema, "enum"), schema.get("const")] if isinstance(schema, dict) else []
        texts = [value for value in values if isinstance(value, str)]
        if texts:
            value = f"({' | '.join(json.dumps(one) for one in texts)}) {end}"
        elif takes_type(schema, "string"):
            value = f'{self._ends_with(f"{rule}_text", PARAMETER_END)} "\\n"'
        else:
            value = f"%json {demanded(schema) if isinstance(schema, dict) else json.dumps(schema)} {end}"
        return self._add(rule, f"{begin} {value}")
