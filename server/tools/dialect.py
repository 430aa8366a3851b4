"""How the model of a server is told of tools, and how it writes calls and thoughts: found from its chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Any

from msgspec.structs import replace

from shoal.model.text.tokenizer import Tokenizer
from shoal.server.rendering import Conversation
from shoal.server.tools.formats import HERMES, TOOL_FORMATS, ToolFormat, find_format
from shoal.server.tools.grammar import Thought, tools_grammar
from shoal.server.tools.prompt import calls_as_text, with_tools_prompt
from shoal.server.tools.reader import THINK, THINK_END, AnswerReader
from shoal.server.tools.thoughts import ThoughtCounter
from shoal.server.wire.conversations import Message, Tool, ToolMode
from shoal.server.wire.requests import ChatBody, CompletionBody

_SHOWS_TOOLS, _SHOWS_CALLS = re.compile(r"\btools\b"), re.compile(r"\btool_calls\b")
_TELLS_NULL = re.compile(r"""content(?:['"]\])? is none""")


@dataclass(frozen=True)
class Reading:
    """How the answers to one request are read."""

    dialect: Dialect
    body: ChatBody
    is_thinking: bool

    def reader(self, ids: Random | None = None) -> AnswerReader | None:
        """A reader for one answer, for whose calls these draw ids; None if all that it says is content."""
        schemas = {tool.function.name: tool.schema for tool in self.body.callable_tools}
        if not schemas and not self.dialect.thinks:
            return None
        return AnswerReader(
            self.dialect.tool_format if schemas else None,
            schemas,
            thinks=self.dialect.thinks,
            is_thinking=self.is_thinking,
            max_calls=1 if self.body.parallel_tool_calls is False else inf,
            ids=ids,
        )

    def counter(self) -> ThoughtCounter | None:
        """What counts the tokens of one answer's thought; None if answers have none."""
        return ThoughtCounter(self.dialect.tokenizer, is_thinking=self.is_thinking) if self.dialect.thinks else None


@dataclass(frozen=True)
class Dialect:
    """What a chat template says of the model.

    Attributes:
        shows_tools: whether the template shows tools; else the system message does.
        shows_calls: whether the template shows calls and their results; else they are told as text.
        tells_null: whether the template tells a message of calls by its null content.
        thinks: whether answers may begin with a thought that is kept apart.
        special: the special tokens that calls and thoughts are written with, by their text.
    """

    tokenizer: Tokenizer
    tool_format: ToolFormat
    shows_tools: bool
    shows_calls: bool
    tells_null: bool
    thinks: bool
    special: Mapping[str, int]

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Conversation:
        """What the template is given.

        Args:
            variables: of the template, which the request sets.

        Raises:
            InvalidRequestError: arguments in a message are too deep.
        """
        told = [message.for_template() for message in messages]
        offered = [tool.for_template() for tool in tools]
        if not self.shows_calls:
            told = calls_as_text(told, self.tool_format)
        elif self.tells_null:
            told = [one | {"content": one["content"] or None} if "tool_calls" in one else one for one in told]
        if offered and not self.shows_tools:
            told, offered = with_tools_prompt(told, offered, self.tool_format), []
        return Conversation(told, add_generation_prompt, offered or None, dict(variables or {}))

    def of_chat(self, body: ChatBody) -> Conversation:
        """What the template is given for a chat."""
        made = self.conversation(
            body.messages,
            tools=body.offered_tools,
            variables=body.template_variables,
            add_generation_prompt=body.add_generation_prompt,
        )
        return replace(made, template=body.chat_template, continues=body.continue_final_message)

    def reading(self, body: ChatBody, prompt: str) -> Reading:
        """How the answers to a prompt are read."""
        return Reading(self, body, self._is_begun(prompt))

    def grammar(self, body: ChatBody, prompt: str, answer: Mapping[str, Any] | None) -> str:
        """What the answers to a prompt keep to: calls of tools, and a schema where they have none; empty for nothing.

        A model whose template shows no tools has never learnt when calls end, and would go on as long as a grammar lets
        it.  So it calls once in a message, unless the request takes several, and not again in place of an answer of a
        schema.

        Raises:
            InvalidRequestError: see `tools_grammar`.
        """
        thought: Thought = "begun" if self._is_begun(prompt) else "may" if self.thinks else "never"
        mode: ToolMode = body.tool_mode
        if mode == "auto" and answer is not None and body.messages[-1].role == "tool" and not self.shows_tools:
            mode = "none"
        parallel, is_named = body.parallel_tool_calls, getattr(body.tool_choice, "function", None) is not None
        if parallel is None:
            parallel = not is_named and (self.shows_tools or (mode == "auto" and answer is None))
        return tools_grammar(
            self.tool_format,
            body.callable_tools,
            mode,
            parallel=parallel,
            special=self.special,
            thought=thought,
            answer=answer,
        )

    def _is_begun(self, prompt: str) -> bool:
        """Whether a prompt ends in the beginning of a thought."""
        return self.thinks and prompt.rstrip().endswith(THINK)

    def shown(self, body: CompletionBody | ChatBody) -> frozenset[int]:
        """Special tokens that stand in the text of answers, for those who read them there."""
        is_read = isinstance(body, ChatBody) and (self.thinks or body.offered_tools)
        return frozenset(self.special.values()) if is_read else frozenset()


def find_dialect(tokenizer: Tokenizer, tool_format: str, reasoning_format: str) -> Dialect:
    """The dialect of a checkpoint.

    Args:
        tool_format: name of a format, or "auto" for that of the chat template.
        reasoning_format: "auto" keeps thoughts apart if the chat template has them, "none" never does.
    """
    template = "\n".join(tokenizer.chat_template.sources.values())
    shows_tools, shows_calls = (one.search(template) is not None for one in (_SHOWS_TOOLS, _SHOWS_CALLS))
    found = find_format(template) if shows_tools or shows_calls else HERMES
    chosen = found if tool_format == "auto" else TOOL_FORMATS[tool_format]
    thinks = reasoning_format == "auto" and THINK_END in template
    special: dict[str, int] = {}
    for text in (*chosen.texts, *((THINK, THINK_END) if thinks else ())):
        special |= tokenizer.special_tokens_in(text)
    return Dialect(
        tokenizer,
        chosen,
        shows_tools=shows_tools,
        shows_calls=shows_calls,
        tells_null=_TELLS_NULL.search(template) is not None,
        thinks=thinks,
        special=special,
    )
