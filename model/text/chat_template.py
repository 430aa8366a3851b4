"""Renders a conversation as the text that a chat model was trained on, by the Jinja template of its checkpoint.

The environment is the one that templates on the Hugging Face Hub are written for: `trim_blocks`, `lstrip_blocks`,
loop controls, `raise_exception`, `strftime_now`, a `tojson` that keeps Unicode and HTML, and the `generation` tag.
It is sandboxed: a template comes with the weights, and is not trusted code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from shoal.scheduler.errors import CheckpointError, InvalidRequestError

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat templates of a checkpoint, compiled when they are first rendered, for that may compute anything.

    Attributes:
        sources: template text by name; "default" is the usual one; "tool_use" replaces it if tools are given.
        variables: for every rendering, such as `bos_token`.

    Raises:
        CheckpointError: a template is not valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any]) -> None:
        self.sources, self.variables = dict(sources), dict(variables)
        self._environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}
        try:
            for source in sources.values():
                self._environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template is not valid: {error}", param="chat_template") from error

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of the conversation, ready to encode without adding special tokens.

        Args:
            add_generation_prompt: end with what opens the assistant's next message.
            continue_final_message: end with the content of the last message.
            tools: JSON schemas of functions that the model may call.
            variables: further variables of the template; they override the checkpoint's.

        Raises:
            InvalidRequestError: there is no template, or it refuses the messages.
            MemoryError: the template wants too much.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise InvalidRequestError("the model has no chat template; use /v1/completions", param="messages")
        names = {**self.variables, "documents": None, **variables}
        said = [_with_arguments(message) for message in messages]
        names |= {"messages": said, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            if name not in self._compiled:
                self._compiled[name] = self._environment.from_string(self.sources[name])
            text = self._compiled[name].render(names)
            return _up_to(text, messages[-1].get("content") or "") if continue_final_message else text
        except MemoryError:
            raise
        except Exception as error:  # a template may raise anything; the messages are the cause
            raise InvalidRequestError(f"the chat template refuses the messages: {error}", param="messages") from error


def _up_to(text: str, content: str) -> str:
    """A conversation up to the end of its last message, which templates may have stripped of white space."""
    stripped = content.strip()
    at = text.rindex(stripped)
    kept = content.lstrip()
    return text[:at] + (kept if text[at:].startswith(kept) else stripped)


def texts_in(value: Any) -> Iterator[str]:
    """All texts in lists and objects, the names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


class _Arguments(dict[str, Any]):
    """Arguments of a call: an object to templates that look into it, and JSON to those that join it to a text."""

    def __str__(self) -> str:
        return _tojson(self)

    def __add__(self, behind: str) -> str:
        return str(self) + behind

    def __radd__(self, before: str) -> str:
        return before + str(self)


def _with_arguments(message: Message) -> Message:
    """The message with `_Arguments` for the arguments of its calls."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        is_object = isinstance(arguments, dict)
        function = {**call["function"], "arguments": _Arguments(arguments) if is_object else arguments}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what to train on; rendering shows its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
