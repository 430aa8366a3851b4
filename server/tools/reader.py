"""Reads what a model says, piece by piece: its thoughts, its calls of tools, and the rest.

Every decision depends on the text alone and never on how it is cut into pieces, so that the pieces of a stream are
together what the whole answer has.  A text that looks like a call and is none stays content.  Only white space next to
calls and thoughts is dropped, and what calls are written with.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import inf
from random import Random, SystemRandom
from typing import Any

import msgspec
from msgspec import Raw

from shoal.server.schemas import property_schemas, takes_type
from shoal.server.tools.brackets import Brackets
from shoal.server.tools.formats import PARAMETER_BEGIN, PARAMETER_END, XML_END, ToolFormat

THINK, THINK_END = "<think>", "</think>"
MAX_HEAD_CHARS = 256  # before the arguments of a call that is no JSON object
_OBJECT_HEAD = re.compile(r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_XML_HEAD = r"\s*<function=(?P<name>[^>\s]+)\s*"
_ID_LETTERS = string.ascii_letters + string.digits


@dataclass(slots=True)
class CallPiece:
    """What is new of a call; the first piece has its id and name, and no arguments.

    Attributes:
        after: characters of the content that is new with it, and stands before it.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None
    after: int = 0


@dataclass(slots=True)
class Said:
    """What some text adds to an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class AnswerReader:
    """Reads one answer.

    Args:
        tool_format: how the model writes calls; None if none are read.
        schemas: of the arguments of each tool, by its name; a call of another tool is none.
        thinks: whether the answer may begin with a thought.
        is_thinking: whether the prompt has begun the thought.
        max_calls: what looks like a further call is content.
        ids: draws the ids of calls.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        thinks: bool = False,
        is_thinking: bool = False,
        max_calls: float = inf,
        ids: Random | None = None,
    ) -> None:
        self._format = tool_format
        self._schemas = schemas
        self._max_calls = max_calls if tool_format else 0
        self._ids = ids or SystemRandom()
        self.num_calls = 0
        self._said = Said()
        self._text = ""  # not yet read
        self._is_whole = False  # nothing follows the text
        self._opened = ""  # what was read of a call that may be none
        self._brackets = Brackets()
        self._num_parameters = 0
        self._num_tried = 0  # characters of a parameter, for its end
        self._schema: Mapping[str, Any] = {}
        self._is_thought_empty = True
        # Takes a part of the text; whether there may be more to do before the next piece.
        self._read: Callable[[], bool] = self._read_begin if thinks else self._read_first
        if is_thinking:
            self._read = self._read_thought

    def feed(self, text: str) -> Said:
        """What is certain with this piece."""
        self._text += text
        return self._run()

    def finish(self) -> Said:
        """The rest, once no more text comes."""
        self._is_whole = True
        return self._run()

    def _run(self) -> Said:
        self._said = Said()
        while self._read():
            pass
        return self._said

    # -- thoughts and content --------------------------------------------------------------------------------------

    def _read_begin(self) -> bool:
        text = self._text.lstrip()
        if text.startswith(THINK):
            self._text = text[len(THINK) :]
            return self._go_on(self._read_thought)
        if THINK.startswith(text) and not self._is_whole:
            return False
        return self._go_on(self._read_first)

    def _read_thought(self) -> bool:
        if self._is_thought_empty:
            self._text = self._text.lstrip()
        thought, _, end = self._take_until((THINK_END,))
        self._is_thought_empty = self._is_thought_empty and not thought
        self._said.reasoning += thought
        return self._go_on(self._read_after_thought) if end else False

    def _read_after_thought(self) -> bool:
        self._text = self._text.lstrip()
        return self._go_on(self._read_first) if self._text or self._is_whole else False

    def _read_first(self) -> bool:
        """Where the content begins: some formats begin a call with a bracket, which is a marker here alone."""
        if self._format is None or not self._format.begins_bare:
            return self._go_on(self._read_content)
        text = self._text.lstrip()
        inner = text.removeprefix("[").lstrip()
        if not inner and not self._is_whole:
            return False
        if not inner.startswith("{"):
            return self._go_on(self._read_content)
        space, self._text = self._text[: len(self._text) - len(text)], text
        return self._open_call(space)

    def _read_content(self) -> bool:
        begins = self._format.begins if self._format and self.num_calls < self._max_calls else ()
        content, space, begin = self._take_until(begins)
        self._said.content += content
        return self._open_call(space + begin) if begin else False

    def _take_until(self, markers: tuple[str, ...]) -> tuple[str, str, str]:
        """The text before the first marker, the white space behind it, and the marker.

        Without one, the text that is certainly neither part of a marker nor white space before it.
        """
        found = [(at, marker) for marker in markers if (at := self._text.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            before, self._text = self._text[:at], self._text[at + len(marker) :]
            text = before.rstrip()
            return text, before[len(text) :], marker
        text = self._text
        if markers and not self._is_whole:
            text = text[: len(text) - _num_begun(text, markers)].rstrip()
        self._text = self._text[len(text) :]
        return text, "", ""

    # -- calls -----------------------------------------------------------------------------------------------------

    def _open_call(self, opened: str) -> bool:
        """Read what may be a call, behind what has opened it."""
        assert self._format is not None
        self._opened = opened
        shapes = {"object": self._read_list, "named": self._read_named, "xml": self._read_xml}
        return self._go_on(shapes[self._format.shape])

    def _refuse(self, num_chars: int) -> bool:
        """It is no call: what has opened it and some characters more are content."""
        self._said.content += self._opened + self._text[:num_chars]
        self._text = self._text[num_chars:]
        return self._go_on(self._read_content)

    def _begin_call(self, name: str) -> None:
        assert self._format is not None
        call_id, after = _new_id(self._ids, self._format.id_chars), len(self._said.content)
        self._said.calls.append(CallPiece(self.num_calls, id=call_id, name=name, after=after))
        self.num_calls += 1
        self._schema = self._schemas[name]

    def _say_arguments(self, arguments: str) -> None:
        if arguments:
            self._said.calls.append(CallPiece(self.num_calls - 1, arguments, after=len(self._said.content)))

    def _read_list(self) -> bool:
        """What may stand before an object: white space, and the bracket of a list."""
        assert self._format is not None
        text = self._text.lstrip()
        if self._format.separator == ",":
            text = text.removeprefix("[").lstrip()
        if not text and not self._is_whole:
            return False
        self._opened += self._text[: len(self._text) - len(text)]
        self._text = text
        self._brackets = Brackets()
        return self._go_on(self._read_object) if text.startswith("{") else self._refuse(0)

    def _read_object(self) -> bool:
        """An object: as soon as its name is known and its arguments begin, they are told as they come."""
        while bracket := self._brackets.next(self._text):
            at = self._brackets.position
            if self._brackets.depth == 0:
                return self._take_object(at)
            if bracket == "{" and self._brackets.depth == 2:
                head = _OBJECT_HEAD.fullmatch(self._text, 0, at - 1)
                if head and head["name"] in self._schemas:
                    return self._begin_arguments(head["name"], at - 1)
        return self._refuse(len(self._text)) if self._is_whole else False

    def _take_object(self, end: int) -> bool:
        call = _read_call(self._text[:end])
        if call is None or call[0] not in self._schemas:
            return self._refuse(end)
        self._begin_call(call[0])
        self._say_arguments(call[1])
        self._text = self._text[end:]
        return self._go_on(self._read_between)

    def _read_named(self) -> bool:
        assert self._format is not None
        name = self._find_name("{", self._format.head)
        if name is None:
            return False
        return self._begin_arguments(name, self._text.index("{")) if name else self._refuse(0)

    def _read_xml(self) -> bool:
        name = self._find_name(">", _XML_HEAD)
        if name is None:
            return False
        if not name:
            return self._refuse(0)
        self._begin_call(name)
        self._text = self._text[self._text.index(">") + 1 :]
        self._num_parameters = 0
        return self._go_on(self._read_parameter)

    def _find_name(self, sign: str, head: str) -> str | None:
        """The name of a tool in what stands before a sign; empty if it is no call, None if that is not certain yet."""
        at = self._text.find(sign)
        if at < 0 and len(self._text) <= MAX_HEAD_CHARS and not self._is_whole:
            return None
        found = _compiled(head).fullmatch(self._text, 0, at) if 0 <= at <= MAX_HEAD_CHARS else None
        return found["name"] if found and found["name"] in self._schemas else ""

    def _begin_arguments(self, name: str, at: int) -> bool:
        self._begin_call(name)
        self._text = self._text[at:]
        self._brackets = Brackets()
        return self._go_on(self._read_arguments)

    def _read_arguments(self) -> bool:
        assert self._format is not None
        while self._brackets.next(self._text):
            if self._brackets.depth == 0:
                self._take_arguments(self._brackets.position)
                return self._go_on(self._read_rest if self._format.shape == "object" else self._read_between)
        self._take_arguments(len(self._text) if self._is_whole else self._brackets.position)
        return False

    def _take_arguments(self, end: int) -> None:
        self._say_arguments(self._text[:end])
        self._text = self._text[end:]
        self._brackets.position = 0

    def _read_rest(self) -> bool:
        """The end of an object behind its arguments; models forget it at times, or tell more of the call."""
        self._text = self._text.lstrip()
        if self._text.startswith(","):
            self._brackets = Brackets(depth=1)
            return self._go_on(self._read_more)
        if not self._text:
            return False
        self._text = self._text.removeprefix("}")
        return self._go_on(self._read_between)

    def _read_more(self) -> bool:
        while self._brackets.next(self._text):
            if self._brackets.depth == 0:
                more, self._text = self._text[: self._brackets.position], self._text[self._brackets.position :]
                self._said.content += "" if _is_json(f'{{"":0{more}') else more
                return self._go_on(self._read_between)
        if self._is_whole:
            self._said.content += self._text
            self._text = ""
        return False

    def _read_between(self) -> bool:
        """What stands behind a call: its end, then another call or content."""
        assert self._format is not None
        text = self._text = self._text.lstrip()
        if end := next((end for end in self._format.ends if text.startswith(end)), ""):
            self._text = text[len(end) :]
            return True
        literals = (*self._format.begins, *self._format.ends)
        if not text or (not self._is_whole and any(one != text and one.startswith(text) for one in literals)):
            return False
        return self._go_on(self._read_next if self.num_calls < self._max_calls else self._read_content)

    def _read_next(self) -> bool:
        """Another call or content."""
        assert self._format is not None
        text = self._text
        if begin := next((begin for begin in self._format.begins if text.startswith(begin)), ""):
            self._text = text[len(begin) :]
            return self._open_call(begin)
        if self._format.shape == "object":
            inner = text.removeprefix(self._format.separator or "").lstrip()
            if not inner and not self._is_whole:
                return False
            if inner.startswith("{"):
                self._text = inner
                return self._open_call(text[: len(text) - len(inner)])
        return self._go_on(self._read_content)

    # -- arguments as tags -----------------------------------------------------------------------------------------

    def _read_parameter(self) -> bool:
        text = self._text = self._text.lstrip()
        if text.startswith(PARAMETER_BEGIN):
            return self._take_parameter()
        if not self._is_whole and any(literal.startswith(text) for literal in (PARAMETER_BEGIN, XML_END)):
            return False
        if not text:  # cut off
            return False
        self._text = text.removeprefix(XML_END)
        self._say_arguments("}" if self._num_parameters else "{}")
        return self._go_on(self._read_between)

    def _take_parameter(self) -> bool:
        name, tag_end, behind = self._text.removeprefix(PARAMETER_BEGIN).partition(">")
        schema = property_schemas(self._schema).get(name)
        value, end, rest = self._split_value(behind, schema)
        if not end and not self._is_whole:
            return False
        before = f"{', ' if self._num_parameters else '{'}{_written(name)}"
        value = value.removeprefix("\n")
        if end:
            value = _argument(value.removesuffix("\n"), schema)
        elif tag_end:
            value = _written(value)[:-1]
        self._say_arguments(f"{before}: {value}" if tag_end else before[:-1])
        self._text = rest
        self._num_parameters += 1
        self._num_tried = 0
        return bool(end)

    def _split_value(self, text: str, schema: Any) -> tuple[str, str, str]:
        """A value, its end, and what follows; JSON may have in one of its texts what looks like the end."""
        if text.lstrip().startswith(("{", "[", '"')) and not takes_type(schema, "string"):
            while (at := text.find(PARAMETER_END, self._num_tried)) >= 0:
                self._num_tried = at + len(PARAMETER_END)
                if _is_json(text[:at].strip()):
                    return text[:at], PARAMETER_END, text[self._num_tried :]
            if not self._is_whole:
                return text, "", ""
        return text.partition(PARAMETER_END)

    def _go_on(self, read: Callable[[], bool]) -> bool:
        self._read = read
        return True


def _new_id(ids: Random, num_chars: int) -> str:
    """A new id for a call, of letters and digits if its length is given."""
    if not num_chars:
        return f"call_{ids.randbytes(12).hex()}"
    return "".join(ids.choice(_ID_LETTERS) for _ in range(num_chars))


def _num_begun(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of the text with which a marker begins."""
    longest = min(len(text), max(map(len, markers)) - 1)
    ends = (text[-length:] for length in range(longest, 0, -1))
    return next((len(end) for end in ends if any(marker.startswith(end) for marker in markers)), 0)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is a JSON object, in whatever order; None if it is none."""
    try:
        fields = msgspec.json.decode(text, type=dict[str, Raw])
        if "name" not in fields and "function" in fields:
            return _read_call(bytes(fields["function"]).decode())
        name = msgspec.json.decode(fields.get("name", Raw(b"null")), type=str)
        arguments = bytes(fields.get("arguments", fields.get("parameters", Raw(b"{}"))))
        if arguments.startswith(b'"'):  # the JSON in a text, as it is in the API
            arguments = msgspec.json.decode(arguments, type=str).encode()
        msgspec.json.decode(arguments, type=dict[str, Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return name, arguments.decode()


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False
    return True


def _argument(text: str, schema: Any) -> str:
    """The JSON of an argument that a model wrote between tags: a text may stand there without quotes."""
    plain = text.strip().lower()
    if takes_type(schema, "string"):
        return "null" if plain == "null" and takes_type(schema, "null") else _written(text)
    if plain in ("true", "false", "null", "none"):  # some templates write as Python does
        return plain.replace("none", "null")
    return text.strip() if _is_json(text) else _written(text)


def _written(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
