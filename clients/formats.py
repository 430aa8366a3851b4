"""What an answer is asked to be (`response_format`), and how its text is read then."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol, Self

from shoal.clients.errors import ParseError, UnsendableError

_TYPES_OF_SCHEMAS = ("object", "array", "string", "number", "integer", "boolean", "null")


class JsonModel(Protocol):
    """An object of a class that has a JSON schema and reads JSON, as pydantic's models do."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Self: ...


ResponseFormat = type[JsonModel] | Mapping[str, Any]
"""A class such as a pydantic model, a JSON schema, or the object that OpenAI's API takes."""


def wire_format(asked: ResponseFormat) -> dict[str, Any]:
    """The object that OpenAI's API takes.

    Raises:
        UnsendableError: it is nothing that can be asked for.
    """
    if isinstance(asked, Mapping):
        kind = asked.get("type")
        is_schema = not isinstance(kind, str) or kind in _TYPES_OF_SCHEMAS
        return _of_schema("answer", dict(asked)) if is_schema else dict(asked)
    if not (isinstance(asked, type) and hasattr(asked, "model_json_schema") and hasattr(asked, "model_validate_json")):
        raise UnsendableError(
            "response_format must be a schema, an object as in OpenAI's API, or a class with model_json_schema and "
            f"model_validate_json, such as a pydantic model, not {asked!r}"
        )
    return _of_schema(asked.__name__, asked.model_json_schema())


def response_text(asked: ResponseFormat) -> dict[str, Any]:
    """The format in `text` that the Responses API takes: the fields of a schema stand beside its type."""
    made = wire_format(asked)
    schema: dict[str, Any] = made.pop("json_schema", {})
    return made | schema


def message_format(asked: ResponseFormat) -> dict[str, Any]:
    """The format in `output_config` that the Messages API takes.

    Raises:
        UnsendableError: it is no schema, and the API has no other format.
    """
    made = wire_format(asked)
    if made["type"] != "json_schema":
        raise UnsendableError(f"response_format of a message must be a schema or a class, not {made['type']!r}")
    return {"type": "json_schema", "schema": made["json_schema"]["schema"]}


def read_text(text: str, asked: ResponseFormat | None) -> Any:
    """What a text stands for: an object of the class that was asked for, else decoded JSON; None if it is any text.

    Raises:
        ParseError: the text is not what was asked for.
    """
    if asked is None:
        return None
    try:
        if not isinstance(asked, Mapping):
            return asked.model_validate_json(text)
        is_json = wire_format(asked)["type"] in ("json_schema", "json_object")
        return json.loads(text) if is_json else None
    except ValueError as error:  # as pydantic's ValidationError is
        raise ParseError(f"the answer is not what response_format asks for: {error}") from error


def _of_schema(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """`strict` is left out: Shoal keeps to the schema without it, and OpenAI's API takes few schemas with it."""
    allowed = re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64]
    return {"type": "json_schema", "json_schema": {"name": allowed, "schema": schema}}
