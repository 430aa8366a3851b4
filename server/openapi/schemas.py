"""JSON schemas of the types that read requests and write answers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from typing import Any, get_args, get_origin

import msgspec
from msgspec.inspect import DataclassType, Field, StructType, multi_type_info

from shoal.server.openapi.fields import meaning
from shoal.server.wire.body import Body

Schema = dict[str, Any]
_NULL = {"type": "null"}
_TEMPLATE = "#/components/schemas/{name}"


class Schemas:
    """The schemas of some types, and the components that they refer to.

    Args:
        closed: whether objects of requests may have no field that is not known.
    """

    def __init__(self, types: Iterable[Any], *, closed: bool) -> None:
        unique = list(dict.fromkeys(types))
        made, components = msgspec.json.schema_components(unique, ref_template=_TEMPLATE)
        self._schemas = dict(zip(unique, made, strict=True))
        kinds = {name: kind for kind in _objects(multi_type_info(unique)) for name in _names(kind.cls)}
        self.components = {name: _component(schema, kinds[name], closed) for name, schema in components.items()}

    def of(self, kind: Any) -> Schema:
        """The schema of one of the types, of several of them, or one that is given."""
        if isinstance(kind, Mapping):
            return dict(kind)
        return {"anyOf": [self._schemas[one] for one in kind]} if isinstance(kind, tuple) else self._schemas[kind]

    def parameters(self, query: type[Body]) -> list[Schema]:
        """What a query may have."""
        component = self.components[query.__name__]
        return [
            {"name": name, "in": "query", "schema": _without_null(schema)}
            for name, schema in component["properties"].items()
        ]


def types_of(kind: Any) -> tuple[Any, ...]:
    """The types among what `Schemas.of` takes."""
    if kind is None or isinstance(kind, Mapping):
        return ()
    return kind if isinstance(kind, tuple) else (kind,)


def _objects(infos: Iterable[Any]) -> Iterator[StructType | DataclassType]:
    """The types with fields, wherever they are in others."""
    waiting, seen = list(infos), set()
    while waiting:
        info = waiting.pop()
        if isinstance(info, StructType | DataclassType):
            if info.cls in seen:
                continue
            seen.add(info.cls)
            yield info
        for name in getattr(info, "__struct_fields__", ()):
            value = getattr(info, name)
            inner = value if isinstance(value, tuple) else (value,)
            waiting += [one for one in inner if isinstance(one, msgspec.inspect.Type | Field)]


def _names(kind: Any) -> tuple[str, ...]:
    """What msgspec may call a type: its name, or a longer one where others have the same."""
    arguments = ", ".join(one.__name__ for one in get_args(kind))
    name = f"{kind.__name__}[{arguments}]" if arguments else kind.__name__
    return tuple(re.sub(r"[^\w.-]", "_", one) for one in (name, f"{kind.__module__}.{name}"))


def _component(schema: Schema, kind: StructType | DataclassType, closed: bool) -> Schema:
    made = dict(schema)
    if "description" in made:
        made["description"] = cleandoc(made["description"]).partition("\n\nAttributes:")[0]
    if issubclass(get_origin(kind.cls) or kind.cls, Body):
        made["properties"] = _fields_of_request(made, kind.cls)
        if not closed:
            made.pop("additionalProperties", None)
    else:
        tag = [kind.tag_field] if isinstance(kind, StructType) and kind.tag_field else []
        made["required"] = tag + [field.encode_name for field in kind.fields if _is_always_there(kind, field)]
    if dataclasses.is_dataclass(kind.cls):
        helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(kind.cls)}
        made["properties"] = {name: _described(one, helps[name]) for name, one in made["properties"].items()}
    return made


def _fields_of_request(schema: Schema, kind: type[Body]) -> dict[str, Schema]:
    """The fields with their meanings and their other names; null is as if a field was left out."""
    kinds, properties = [one.__name__ for one in kind.__mro__], {}
    for name, field in schema["properties"].items():
        known = _described(field, meaning(kinds, name))
        properties[name] = known if name in schema["required"] else _or_null(known)
    for alias, name in kind.aliases.items():
        properties[alias] = _described(properties[name], f"another name for `{name}`")
    return properties


def _described(schema: Schema, description: str | None) -> Schema:
    return schema if description is None else {**schema, "description": description}


def _or_null(schema: Schema) -> Schema:
    if schema.keys() <= {"description", "default"} or _NULL in schema.get("anyOf", ()):
        return schema
    around: Schema = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in around}
    either: Schema = {"anyOf": [*inner.get("anyOf", [inner]), _NULL]}
    return either | around


def _without_null(schema: Schema) -> Schema:
    kinds = [one for one in schema.get("anyOf", [schema]) if one != _NULL]
    around = {key: value for key, value in schema.items() if key != "anyOf" and value is not None}
    return {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), **around}


def _is_always_there(kind: StructType | DataclassType, field: Field) -> bool:
    """Whether an answer has the field whatever it says."""
    config = getattr(get_origin(kind.cls) or kind.cls, "__struct_config__", None)
    if config and config.omit_defaults:
        return field.required
    return field.required or (field.default, field.default_factory) != (msgspec.NODEFAULT, msgspec.NODEFAULT)
