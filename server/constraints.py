"""From what a request's text is to keep to, to one grammar for llguidance."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import msgspec
from llguidance import LLMatcher, StructTag
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from shoal.model.text.grammar import IDLE_SECONDS, MAX_FAULT_CHARS, GrammarCompiler
from shoal.scheduler.errors import InvalidRequestError
from shoal.server.schemas import WRITTEN, adapted
from shoal.server.wire.constraints import TOOLS, ConstrainedBody, Constraint, StructuralTags
from shoal.server.wire.requests import ChatBody

Schema = Mapping[str, Any]

MAX_KEPT, MAX_KEPT_CHARS = 64, 65_536  # grammars that are known to be good, and the length of each: of 128 tools, too
_FORBIDDEN = re.compile(r"\bmax_tokens\s*=")  # a matcher of such a grammar cannot go back


class Constraints:
    """Makes grammars of what requests ask for, and tries each.

    Args:
        compiler: of the model's tokens.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._tried = lru_cache(maxsize=MAX_KEPT)(self._try)

    async def prepare(self, is_idle: Callable[[], bool]) -> None:
        """Make in advance what every grammar needs, when nothing else is to be done: see `GrammarCompiler.prepare`."""
        await asyncio.sleep(IDLE_SECONDS)
        while not is_idle():  # noqa: ASYNC110 (a pause of a moment is none)
            await asyncio.sleep(IDLE_SECONDS)
        await asyncio.to_thread(self._compiler.prepare)

    async def resolve(self, body: ConstrainedBody, answers: Callable[[Schema | None], str] | None = None) -> str:
        """The grammar that the text of a request keeps to; empty if it may be any text.  Others have their turn.

        Args:
            answers: of a chat that offers tools, or may begin with a thought: makes the grammar of its answers.  Where
                they call nothing they are of the schema.

        Raises:
            InvalidRequestError: a field cannot be understood, or two fields ask for a grammar.
        """
        asked = body.constraint()
        has_tools = isinstance(body, ChatBody) and bool(body.offered_tools)
        if asked is None and not has_tools:
            return ""
        if asked is not None and has_tools and asked.kind != "json":
            asked.refuse("contradicts tools: with tools a text can keep to a JSON schema only")
        try:
            return await asyncio.to_thread(self._make, asked, answers)
        except (InvalidRequestError, ValueError, GbnfToLarkError, RecursionError) as error:
            (asked or TOOLS).refuse(str(error).removeprefix("tools: ")[:MAX_FAULT_CHARS])

    def _make(self, asked: Constraint | None, answers: Callable[[Schema | None], str] | None) -> str:
        """The grammar for one of the two; found again if it was made lately."""
        text = None if asked is None else _text(asked.value)
        kind, whitespace = ("", None) if asked is None else (asked.kind, asked.whitespace)
        if answers is not None and kind in ("", "json"):
            made = answers(None if text is None else _schema(text))
            if made or text is None:
                kind, text = "", made
        if not text:
            return ""
        find = self._tried if len(text) <= MAX_KEPT_CHARS else self._try
        return find(kind, text, whitespace)

    def _try(self, kind: str, value: str, whitespace: str | None) -> str:
        """Make the grammar of a value, which is one already where it has no kind, and try it."""
        grammar = make_grammar(kind, value, whitespace) if kind else value
        self._compiler.compile(grammar)
        return grammar


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _schema(text: str) -> Schema:
    schema = json.loads(text)
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object or true")
    return schema


def make_grammar(kind: str, value: str, whitespace: str | None = None) -> str:
    """What llguidance takes.

    Raises:
        ValueError, GbnfToLarkError, RecursionError: it cannot be understood.
    """
    match kind:
        case "json":
            options: dict[str, Any] = WRITTEN if whitespace is None else {"whitespace_flexible": False}
            if whitespace:
                options = {"whitespace_pattern": whitespace}
            schema = json.dumps(adapted(_schema(value)))
            return LLMatcher.grammar_from_json_schema(schema, defaults=options)  # type: ignore[arg-type]
        case "regex":
            return LLMatcher.grammar_from_regex(value)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(value))))
        case "structural_tag":
            return _from_tags(value)
        case _:
            return _from_lark(gbnf_to_lark(value) if "::=" in value else value)


def _from_lark(text: str) -> str:
    if _FORBIDDEN.search(text):
        raise ValueError("max_tokens cannot stand in a grammar: give it as a field of the request")
    return LLMatcher.grammar_from_lark(text)


def _from_tags(text: str) -> str:
    tags = msgspec.json.decode(text, type=StructuralTags)
    made = []
    for one in tags.structures:
        trigger = next((trigger for trigger in tags.triggers if one.begin.startswith(trigger)), None)
        if trigger is None:
            raise ValueError(f"none of the triggers begins {one.begin[:40]!r}")
        schema = json.dumps(adapted(_schema(_text(one.schema))))
        made.append(StructTag(trigger=trigger, begin=one.begin, grammar=schema, end=one.end))
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(made, assume_special=False))
