"""Tools as a user's program has them, and as the APIs of OpenAI and Anthropic take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, getdoc, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from shoal.clients.errors import UnsendableError

Tool = Callable[..., Any] | Mapping[str, Any]
"""A function with type hints, or the object that OpenAI's API takes."""

ToolChoice = str | Tool
""""auto", "none", "required", the function that has to be called, or the object that OpenAI's API takes."""

_SCHEMAS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    list: {"type": "array"},
    dict: {"type": "object"},
    NoneType: {"type": "null"},
    Any: {},
}


def wire_tool(tool: Tool) -> dict[str, Any]:
    """The object that OpenAI's API takes.  A function is described by its name, its type hints, and its docstring.

    Raises:
        UnsendableError: a parameter of the function has no type hint, or one that is no JSON.
    """
    if isinstance(tool, Mapping):
        return dict(tool)
    name = _name(tool)
    try:
        hints = get_type_hints(tool, include_extras=True)
        parameters = signature(tool).parameters
    except (NameError, TypeError, ValueError) as error:
        raise UnsendableError(f"tool {name}: its signature cannot be read: {error}") from error
    properties = {each.name: _property(name, each, hints.get(each.name)) for each in parameters.values()}
    schema = {
        "type": "object",
        "properties": properties,
        "required": [each.name for each in parameters.values() if each.default is Parameter.empty],
        "additionalProperties": False,
    }
    summary = (getdoc(tool) or "").partition("\n\n")[0]
    described = {"description": summary} if summary else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": schema, "strict": True}}


def wire_choice(choice: ToolChoice) -> str | dict[str, Any]:
    """The value that OpenAI's API takes."""
    if isinstance(choice, str):
        return choice
    return dict(choice) if isinstance(choice, Mapping) else {"type": "function", "function": {"name": _name(choice)}}


def response_tool(tool: Tool) -> dict[str, Any]:
    """The object that the Responses API takes; what is no function is passed on."""
    return dict(tool) if isinstance(tool, Mapping) else {"type": "function", **wire_tool(tool)["function"]}


def response_choice(choice: ToolChoice) -> str | dict[str, Any]:
    """The value that the Responses API takes."""
    return wire_choice(choice) if isinstance(choice, str | Mapping) else {"type": "function", "name": _name(choice)}


def message_tool(tool: Tool) -> dict[str, Any]:
    """The object that the Messages API takes; what is no function is passed on."""
    if isinstance(tool, Mapping):
        return dict(tool)
    function = wire_tool(tool)["function"]
    return {"input_schema": function.pop("parameters"), **function}


def message_choice(choice: ToolChoice) -> dict[str, Any]:
    """The object that the Messages API takes, which calls "any" what OpenAI's calls "required"."""
    if isinstance(choice, str):
        return {"type": "any" if choice == "required" else choice}
    return dict(choice) if isinstance(choice, Mapping) else {"type": "tool", "name": _name(choice)}


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise UnsendableError(f"a tool must be a function or an object as in OpenAI's API, not {function!r}")
    return name


def _property(tool: str, parameter: Parameter, hint: Any) -> dict[str, Any]:
    if hint is None or parameter.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
        raise UnsendableError(f"tool {tool}: {parameter} must have a type hint, and take an argument by its name")
    try:
        return _schema(hint)
    except TypeError as error:
        raise UnsendableError(f"tool {tool}: {parameter} has a type that is no JSON: {error}") from error


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type, which a text in `Annotated` describes.

    Raises:
        TypeError: it has none.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        notes = [note for note in hint.__metadata__ if isinstance(note, str)]
        return _schema(arguments[0]) | ({"description": notes[0]} if notes else {})
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(each) for each in arguments]}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if hint not in _SCHEMAS:
        raise TypeError(f"{hint!r}")
    return _SCHEMAS[hint]
