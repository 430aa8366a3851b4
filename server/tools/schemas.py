"""What is asked of the JSON schemas of tools.  They come from clients: any part of them may be anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# With one of these a schema says elsewhere which properties there are.
_COMPOSED = ("additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf")
# Spaces as Python writes them and chat templates show them.  If they were free, the model would have to choose them.
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def demanded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of arguments that a grammar demands: no property that the tool does not name, written in one way."""
    is_open = "properties" not in schema or any(name in schema for name in _COMPOSED)
    return {**schema, **({} if is_open else {"additionalProperties": False}), "x-guidance": WRITTEN}


def property_schemas(schema: Mapping[str, Any]) -> dict[str, Any]:
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


def listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    """The list under a name; empty if there is none."""
    value = schema.get(name)
    return value if isinstance(value, list) else []
