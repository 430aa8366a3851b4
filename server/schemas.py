"""JSON schemas as clients send them, and as grammars demand them.  Any part of one may be anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

Schema = Mapping[str, Any]

# Spaces as Python writes them and chat templates show them.  If they were free, the model would have to choose them.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The formats that llguidance knows; any other says nothing of what is valid (JSON Schema 2020-12, validation, 7.2.1).
_FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
_MAX_CHARS = {"date-time": 32, "time": 21}  # with microseconds: what follows them says nothing
_BY_NAME = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}  # hold schemas by name
_VALUES = {"const", "default", "enum", "example", "examples"}  # hold values, and no schemas
MAX_REMEMBERED, MAX_REMEMBERED_CHARS = 1024, 4096
_COMPOSES = {"allOf", "dependentSchemas", "if", "not", "unevaluatedProperties"}
_REFERS = {"$ref", "anyOf", "oneOf"}
_OPENS = {"additionalProperties", "minProperties"}  # with one of these, there may have to be other properties
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")  # what no automaton can do


def adapted(schema: Schema) -> dict[str, Any]:
    """A schema that llguidance takes, so far as it can be made: whatever keeps to it keeps to the one given.

    What says nothing is left out, and of alternatives those that no grammar can demand.  Names of properties become
    patterns.  Where an object names its properties it has no others, if what is said elsewhere cannot contradict that.
    """
    made: dict[str, Any] = _adapted(schema, schema, is_closed=not any(map(_is_composed, _objects(schema))))
    return made


def _adapted(schema: Any, root: Schema, *, is_closed: bool) -> Any:
    adapt = partial(_adapted, root=root, is_closed=is_closed)
    if isinstance(schema, list):
        return [adapt(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, dict):
            made[name] = {key: adapt(one) for key, one in value.items()}
        elif name in _VALUES:
            made[name] = value
        elif (name, value) != ("uniqueItems", False) and not (name == "format" and str(value) not in _FORMATS):
            made[name] = adapt(value)
    if able := [one for one in listed(made, "anyOf") if not _looks_around(one)]:
        made["anyOf"] = able
    if "propertyNames" in made and not {"properties", "patternProperties"} & made.keys():
        _name_properties(made, root)
    if is_closed and not _OPENS & made.keys() and _names_all(made):
        made["additionalProperties"] = False
    if "maxLength" not in made and (most := _MAX_CHARS.get(str(made.get("format")))):
        made["maxLength"] = most
    return made


def _names_all(schema: Schema) -> bool:
    """Whether a schema names properties, and all that it demands: there can be an object that has no others."""
    properties = schema.get("properties", {} if "patternProperties" in schema else None)
    return isinstance(properties, dict) and all(str(name) in properties for name in listed(schema, "required"))


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a value, itself among them."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


def _is_composed(schema: Schema) -> bool:
    """Whether parts of a schema, of which each may name some properties, are about one object."""
    return bool(_COMPOSES & schema.keys() or ("properties" in schema and _REFERS & schema.keys()))


def _looks_around(schema: Any) -> bool:
    return isinstance(schema, dict) and _LOOKS_AROUND.search(str(schema.get("pattern"))) is not None


def _name_properties(schema: dict[str, Any], root: Schema) -> None:
    """Say by properties, or by patterns of them, which names there may be, where that can be said."""
    names, value = schema["propertyNames"], schema.get("additionalProperties", {})
    reference = str(names.get("$ref")) if isinstance(names, dict) else ""
    if reference.startswith(("#/$defs/", "#/definitions/")):
        _, place, name = reference.split("/", 2)
        shared = root.get(place)
        names = shared.get(name) if isinstance(shared, dict) else None
    if not isinstance(names, dict):
        return
    closed: dict[str, Any] = {}
    match {name: said for name, said in names.items() if name not in ("description", "title", "type")}:
        case {"enum": list(allowed), **rest} if not rest and all(isinstance(one, str) for one in allowed):
            closed = {"properties": dict.fromkeys(allowed, value), "additionalProperties": False}
        case {"const": str(allowed), **rest} if not rest:
            closed = {"properties": {allowed: value}, "additionalProperties": False}
        case {"pattern": str(pattern), **rest} if not rest:
            closed = {"patternProperties": {pattern: value}, "additionalProperties": False}
        case said if said or names.get("type", "string") != "string":
            return
    del schema["propertyNames"]
    schema.update(closed)


def demanded(schema: Schema) -> str:
    """The JSON of the schema that a grammar demands, written in one way.  Tools come with each turn of an agent."""
    text = json.dumps(schema)
    return _remembered(text) if len(text) <= MAX_REMEMBERED_CHARS else _demanded(text)


def _demanded(text: str) -> str:
    return json.dumps({**adapted(json.loads(text)), "x-guidance": WRITTEN})


_remembered = lru_cache(maxsize=MAX_REMEMBERED)(_demanded)


def property_schemas(schema: Schema) -> dict[str, Any]:
    """The schemas of an object's properties by name, with the definitions that they may refer to."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return {name: {**shared, **one} if isinstance(one, dict) else one for name, one in properties.items()}


def takes_type(schema: Any, kind: str) -> bool:
    """Whether a value of this type may be valid, so far as the schema itself says."""
    if not isinstance(schema, dict):
        return False
    named = schema.get("type")
    if named == kind or (isinstance(named, list) and kind in named):
        return True
    if kind == "string" and any(isinstance(value, str) for value in [*listed(schema, "enum"), schema.get("const")]):
        return True
    return any(takes_type(one, kind) for name in ("anyOf", "oneOf") for one in listed(schema, name))


def listed(schema: Schema, name: str) -> list[Any]:
    """The list under a name; empty if there is none."""
    value = schema.get(name)
    return value if isinstance(value, list) else []
