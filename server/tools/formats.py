"""The table of tool-call formats: how a model writes that it calls a function.

A call is written as `before_name NAME before_arguments ARGUMENTS after_arguments`; several stand one behind another,
with `between` between them, and all together between `opening` and `closing`.  `server/tools/grammar.py` demands
exactly that; `server/tools/reader.py` reads what models make of it too: other spaces, another order, a brace left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How calls are written.

    Attributes:
        signs: a chat template that has all of these texts asks for this format.
        shape: what a call is.  "object": a JSON object with name and arguments; "named": a name, and a JSON object of
            arguments; "xml": a name, and a tag for each argument.
        begins: texts of which each begins a call, or a section of calls, anywhere in an answer.
        ends: texts that may stand behind a call and say nothing.
        separator: may stand between two calls.
        begins_bare: whether an answer that begins with a JSON object, or with a list of them, may be calls.
        head: of the shape "named": what stands before the arguments, behind one of `begins`, as a regular expression.
        inner: texts that `head` takes and that are not written.
        id_chars: length of the ids of calls that its templates accept; 0 for any.
    """

    name: str
    signs: tuple[str, ...] = ()
    shape: Literal["object", "named", "xml"] = "object"

    opening: str = ""
    before_name: str = '{"name": "'
    before_arguments: str = '", "arguments": '
    after_arguments: str = "}"
    between: str = "\n"
    closing: str = ""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    separator: str | None = None
    begins_bare: bool = False
    head: str = ""
    inner: tuple[str, ...] = ()
    id_chars: int = 0

    @property
    def texts(self) -> tuple[str, ...]:
        """All fixed texts, in which special tokens of the model may stand."""
        written = (self.opening, self.before_name, self.before_arguments, self.after_arguments, self.closing)
        return *written, *self.begins, *self.ends, *self.inner

    def write(self, calls: Sequence[tuple[str, dict[str, Any] | str]]) -> str:
        """The calls of an assistant's message as text: names and arguments, which may be text that is no JSON."""
        written = self.between.join(
            f"{self.before_name}{name}{self.before_arguments}{self._arguments(arguments)}{self.after_arguments}"
            for name, arguments in calls
        )
        return f"{self.opening}{written}{self.closing}"

    def _arguments(self, arguments: dict[str, Any] | str) -> str:
        if isinstance(arguments, str):
            return arguments
        if self.shape != "xml":
            return json.dumps(arguments, ensure_ascii=False)
        return "".join(
            f"{PARAMETER_BEGIN}{name}>\n{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            f"\n{PARAMETER_END}\n"
            for name, value in arguments.items()
        )


PARAMETER_BEGIN, PARAMETER_END, XML_END = "<parameter=", "</parameter>", "</function>"

HERMES = ToolFormat(
    name="hermes",  # of Hermes 2 and 3, Qwen2.5, Qwen3, SmolLM3
    signs=("<tool_call>",),
    before_name='<tool_call>\n{"name": "',
    after_arguments="}\n</tool_call>",
    begins=("<tool_call>",),
    ends=("</tool_call>",),
)
QWEN_XML = ToolFormat(
    name="qwen_xml",  # of Qwen3-Coder
    signs=("<tool_call>", "<function="),
    shape="xml",
    before_name="<tool_call>\n<function=",
    before_arguments=">\n",
    after_arguments="</function>\n</tool_call>",
    begins=("<tool_call>",),
    ends=("</tool_call>",),
)
LLAMA3 = ToolFormat(
    name="llama3",  # of Llama 3.1, 3.2 and 3.3
    signs=("<|start_header_id|>", '"parameters"'),
    before_arguments='", "parameters": ',
    between="; ",
    begins=("<|python_tag|>",),
    ends=("<|eom_id|>",),
    separator=";",
    begins_bare=True,
)
MISTRAL = ToolFormat(
    name="mistral",  # of Mistral 7B v0.3, Nemo, Small until 3.1
    signs=("[TOOL_CALLS]",),
    opening="[TOOL_CALLS][",
    between=", ",
    closing="]",
    begins=("[TOOL_CALLS]",),
    ends=("]",),
    separator=",",
    id_chars=9,
)
MISTRAL_ARGS = ToolFormat(
    name="mistral_args",  # of Mistral Small 3.2, Devstral, Magistral
    signs=("[TOOL_CALLS]", "[ARGS]"),
    shape="named",
    before_name="[TOOL_CALLS]",
    before_arguments="[ARGS]",
    after_arguments="",
    between="",
    begins=("[TOOL_CALLS]",),
    head=r"\s*(?P<name>[\w-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*",
    inner=("[CALL_ID]",),
    id_chars=9,
)
DEEPSEEK = ToolFormat(
    name="deepseek",  # of DeepSeek V3 and R1
    signs=("<｜tool▁calls▁begin｜>", "```json"),
    shape="named",
    opening="<｜tool▁calls▁begin｜>",
    before_name="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    before_arguments="\n```json\n",
    after_arguments="\n```<｜tool▁call▁end｜>",
    closing="<｜tool▁calls▁end｜>",
    begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    ends=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    head=r"\s*(?:<｜tool▁call▁begin｜>)?(?:function<｜tool▁sep｜>)?(?P<name>[\w-]+)\s*(?:```json)?\s*",
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",  # of DeepSeek V3.1
    signs=("<｜tool▁calls▁begin｜>",),
    shape="named",
    opening="<｜tool▁calls▁begin｜>",
    before_name="<｜tool▁call▁begin｜>",
    before_arguments="<｜tool▁sep｜>",
    after_arguments="<｜tool▁call▁end｜>",
    between="",
    closing="<｜tool▁calls▁end｜>",
    begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    ends=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    head=r"\s*(?:<｜tool▁call▁begin｜>)?(?P<name>[\w-]+)<｜tool▁sep｜>\s*",
)
JSON = ToolFormat(name="json", ends=("]",), separator=",", begins_bare=True)

# Of two whose signs a template has, the first is meant.
TOOL_FORMATS = {
    one.name: one for one in (DEEPSEEK, DEEPSEEK_V31, MISTRAL_ARGS, MISTRAL, QWEN_XML, HERMES, LLAMA3, JSON)
}


def find_format(template: str) -> ToolFormat:
    """The format that a chat template asks for; plain JSON if it names none."""
    return next(one for one in TOOL_FORMATS.values() if all(sign in template for sign in one.signs))
