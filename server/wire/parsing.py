"""Reads request bodies.

Reading stops at the first fault, so that a body of a million faults costs no more than one.  A body that is as it
should be is read in one pass; only where something is null or unknown it is looked at again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Raw
from msgspec.inspect import ListType, LiteralType, Metadata, StructType, Type, UnionType, type_info

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body, Refusal

# How often a body may have a byte, its texts included, for it would take long to read: lists of more tokens than any
# context holds, more lists or more fields than any request has.
MAX_BYTES = {b",": 400_000, b"[": 50_000, b":": 50_000}
MAX_ITEMS = 50_000  # of a list, in which something unknown is looked for
MAX_NEUTRAL_BYTES = 32  # of a value that may ask for nothing
MAX_NAMED, MAX_NAME_CHARS = 16, 64  # unknown fields that are named, and what of their names
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")  # by which a field asks for nothing

Kind = TypeVar("Kind", bound=Body)
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "object": "an object",
    "str": "text",
}


@cache
def _decoder(kind: type[Kind]) -> msgspec.json.Decoder[Kind]:
    return msgspec.json.Decoder(kind)


def parse_body(kind: type[Kind], raw: bytes, ignored: list[str] | None = None) -> Kind:
    """Read a request body.  A field that is null is as if it was left out, unless it is needed.

    Args:
        ignored: unknown fields are left out, and their names added here; without it they are refused.

    Raises:
        InvalidRequestError: it is not JSON, or a field is missing, unknown, of the wrong type or out of range, or asks
            for what this server does not do.
    """
    for byte, most in MAX_BYTES.items():
        if raw.count(byte) > most:
            raise InvalidRequestError(f"the request body has more than {most} times {byte.decode()!r}")
    try:
        body = _decode(kind, raw, ignored)
    except msgspec.ValidationError as error:
        raise _request_error(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(f"the request body is not valid JSON: {error}") from error
    body.check()
    return body


def _decode(kind: type[Kind], raw: bytes, ignored: list[str] | None) -> Kind:
    decoder: msgspec.json.Decoder[Kind] = _decoder(kind)
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        if b"null" not in raw and "unknown field" not in str(error):
            raise
    return decoder.decode(_fitted(raw, _plan(kind), "", ignored))


class _Plan(NamedTuple):
    """Where in a value objects with fields are to be found."""

    kind: type[Body] | None = None
    fields: Mapping[str, _Plan | None] = {}
    needed: frozenset[str] = frozenset()
    items: _Plan | None = None
    max_items: int = 0


@cache
def _plan(kind: type[Body]) -> _Plan:
    found = _find_plan(type_info(kind))
    assert found is not None
    return found


def _find_plan(info: Type) -> _Plan | None:
    match info:
        case Metadata():
            return _find_plan(info.type)
        case StructType():
            needed = frozenset(field.encode_name for field in info.fields if field.required)
            fields = {field.encode_name: _find_plan(field.type) for field in info.fields}
            return _Plan(info.cls if issubclass(info.cls, Body) else None, fields, needed)
        case ListType():
            items = _find_plan(info.item_type)
            return items and _Plan(items=items, max_items=info.max_length or MAX_ITEMS)
        case UnionType():
            plans = [plan for one in info.types if (plan := _find_plan(one))]
            parts = {name: value for plan in plans for name, value in plan._asdict().items() if value}
            return _Plan(**parts) if parts else None
    return None


def _fitted(raw: bytes, plan: _Plan, path: str, ignored: list[str] | None) -> bytes:
    """A value without what is null or unknown in its objects, and with the names that the server knows."""
    if plan.fields and raw.lstrip().startswith(b"{"):
        return msgspec.json.encode(_fitted_fields(raw, plan, path, ignored))
    if plan.items and raw.lstrip().startswith(b"["):
        items = msgspec.json.decode(raw, type=list[Raw])
        if len(items) <= plan.max_items:
            return msgspec.json.encode([Raw(_fitted(bytes(one), plan.items, f"{path}[]", ignored)) for one in items])
    return raw


def _fitted_fields(raw: bytes, plan: _Plan, path: str, ignored: list[str] | None) -> dict[str, Raw]:
    given = msgspec.json.decode(raw, type=dict[str, Raw])
    aliases, refused = (plan.kind.aliases, plan.kind.refused) if plan.kind else ({}, {})
    made: dict[str, Raw] = {}
    for spelt, value in given.items():
        name = aliases.get(spelt, spelt)
        place = f"{path}.{name}".lstrip(".")
        if name in plan.fields:
            inner = plan.fields[name]
            if name in plan.needed or bytes(value) != b"null":
                made.setdefault(name, Raw(_fitted(bytes(value), inner, place, ignored)) if inner else value)
        elif name in refused:
            _refuse(name, value, refused[name])
        elif bytes(value) == b"null":
            continue
        elif ignored is None:
            made[name] = value
        elif len(ignored) < MAX_NAMED and place[:MAX_NAME_CHARS] not in ignored:
            ignored.append(place[:MAX_NAME_CHARS])
    return made


def _refuse(name: str, value: Raw, refusal: Refusal) -> None:
    asked = msgspec.json.decode(value) if len(bytes(value)) < MAX_NEUTRAL_BYTES else value
    if asked not in (*_NOTHING, refusal.neutral):
        raise InvalidRequestError(f"{name}: {refusal.reason}", param=name)


def read_body(kind: type[Kind], values: dict[str, Any], *, strict: bool = True) -> Kind:
    """Make a body of Python values, which may be text if not `strict`; raises as `parse_body` does."""
    try:
        body: Kind = msgspec.convert(values, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _request_error(str(error), kind) from error
    body.check()
    return body


def _request_error(fault: str, kind: type[Body]) -> InvalidRequestError:
    """What msgspec says of a fault, in a sentence that begins with the field."""
    message, _, place = fault.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    if named := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", message, re.DOTALL):
        name = f"{path}.{named[2]}".lstrip(".")
        what = "unrecognized request argument" if "unknown" in named[1] else "missing required field"
        return InvalidRequestError(f"{what}: {name}", param=name.partition(".")[0].partition("[")[0])
    names = [name.partition("[")[0] for name in path.split(".")]
    if allowed := _allowed(type_info(kind), names) if message.startswith("Invalid enum value") else ():
        message = f"expected {' or '.join(map(repr, allowed))}"
    message = re.sub(
        r"`([\w| ]+)`", lambda words: " or ".join(_WORDS.get(w, w) for w in words[1].split(" | ")), message
    )
    return InvalidRequestError(f"{path or 'request body'}: {message[:1].lower()}{message[1:]}", param=names[0] or None)


def _allowed(info: Any, path: list[str]) -> tuple[Any, ...]:
    """The values of the literal type at a path."""
    match info:
        case LiteralType() if not path:
            return tuple(info.values)
        case UnionType():
            return tuple(value for each in info.types for value in _allowed(each, path))
        case ListType():
            return _allowed(info.item_type, path)
        case StructType() if path:
            return tuple(
                value
                for field in info.fields
                if field.encode_name == path[0]
                for value in _allowed(field.type, path[1:])
            )
    return ()
