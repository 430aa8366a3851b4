"""Makes the OpenAPI document of the routes that are served."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from inspect import getdoc
from typing import Any, get_type_hints

import msgspec
from fastapi.routing import APIRoute

from shoal.scheduler.errors import ShoalError
from shoal.server.errors import (
    OPENAI,
    AuthenticationError,
    EngineUnavailableError,
    ErrorShape,
    ForbiddenError,
    HeadTooLargeError,
    MalformedRequestError,
    UrlTooLongError,
    http_error,
)
from shoal.server.headers import MAX_ID_CHARS
from shoal.server.openapi.operations import OPERATIONS, TAGS, Events, Operation
from shoal.server.openapi.schemas import Schema, Schemas, types_of
from shoal.server.routes.answer import encode, event
from shoal.server.routes.streams import MAX_KEY_CHARS
from shoal.server.service import Service
from shoal.server.wire.requests import MAX_TIMEOUT_SECONDS

_DESCRIPTION = """\
A small, complete LLM inference server.  It speaks OpenAI's API for text, with vLLM's common extensions.

- A field that is null is as if it was left out, unless it is required.
- The answer names fields that the server does not know and ignores in the header `x-ignored-fields`.
- HEAD is answered wherever GET is, and OPTIONS on every path.
- `docs/api.md` of the sources describes each field and header.
"""
_ALWAYS = (
    MalformedRequestError,
    ForbiddenError,
    UrlTooLongError,
    HeadTooLargeError,
    ShoalError,
    EngineUnavailableError,
)
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "string", "pattern": "^[0-9]+$"}
_DURATION: Schema = {"type": "string", "pattern": "^([0-9]+m)?[0-9]+s$"}

# By name: those with a small first letter stand in answers, as they are sent; the others in requests.
HEADERS: Mapping[str, tuple[str, Schema]] = {
    "X-Request-Id": ("is kept, and stands in the answer", {**_TEXT, "maxLength": MAX_ID_CHARS}),
    "Idempotency-Key": (
        "what is sent again with the same key is done once",
        {**_TEXT, "minLength": 1, "maxLength": MAX_KEY_CHARS},
    ),
    "Last-Event-ID": ("the `id` of the last event that was read: the stream goes on after it", _TEXT),
    "X-Stream-Resume": ("`true`: the stream outlives its connection", {"enum": ["true", "false"]}),
    "X-Request-Timeout": (
        "seconds, as the field `timeout`",
        {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_SECONDS},
    ),
    "X-Shoal-Timing": ("`true`: as the field `timing`", {"enum": ["true", "false"]}),
    "request-id": ("what `request_id` of an error says; the `id` of the message where there is one", _TEXT),
    "x-request-id": ("the `id` of the answer, or of the request", _TEXT),
    "x-ignored-fields": ("fields that the server does not know", _TEXT),
    "x-seed": ("the `seed` of the answer", _COUNT),
    "x-stream-resume": ("`true`: the answer is held", {"const": "true"}),
    "x-ratelimit-limit-requests": ("requests that the API key has for a minute", _COUNT),
    "x-ratelimit-remaining-requests": ("how many of them are left", _COUNT),
    "x-ratelimit-reset-requests": ("when all of them are there again", _DURATION),
    "x-ratelimit-limit-tokens": ("tokens that the API key has for a minute", _COUNT),
    "x-ratelimit-remaining-tokens": ("how many of them are left", _COUNT),
    "x-ratelimit-reset-tokens": ("when all of them are there again", _DURATION),
    "retry-after": ("seconds to wait before the next try", _COUNT),
    "www-authenticate": ("how to say who one is", {"const": "Bearer"}),
}
SECURITY: Mapping[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_PATHS = {
    "name": "one of the names of the served model",
    "stream_id": "the `id` of the answer",
    "response_id": "the `id` of the response",
    "file_id": "the `id` of the file",
    "batch_id": "the `id` of the batch",
    "request_id": "id of the engine's request, as events have it",
    "file_name": "a file of the page",
    "load_id": "the `id` of the load",
}


def make_document(routes: Iterable[tuple[APIRoute, bool]], service: Service) -> Schema:
    """The document.

    Args:
        routes: each with whether it asks for a key.
    """
    served = {
        f"{method} {path_of(route)}": (route, is_guarded)
        for route, is_guarded in routes
        for method in route.methods or ()
    }
    found = {name: OPERATIONS[name] for name in sorted(served, key=list(OPERATIONS).index)}
    schemas = Schemas(_types(found.values()), closed=service.settings.server.unknown_fields == "refuse")
    asks: list[Schema] = [{name: []} for name in SECURITY]
    paths: dict[str, Schema] = {}
    for name, operation in found.items():
        method, path = name.split(" ")
        route, is_guarded = served[name]
        made = _operation(operation, schemas, is_guarded)
        if is_guarded:
            made["security"] = asks if service.api_keys else [{}, *asks]
        parameters = [_path_parameter(one) for one in re.findall(r"{(\w+)}", path)] + made.pop("parameters")
        paths.setdefault(path, {})[method.lower()] = {"operationId": route.name, "parameters": parameters, **made}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Shoal",
            "version": version("shoal"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "headers": {name: _header(name) for name in HEADERS if name.islower()},
            "securitySchemes": dict(SECURITY),
        },
    }


def path_of(route: APIRoute) -> str:
    """The path of a route as OpenAPI writes it, without the kinds of its parameters."""
    return re.sub(r":\w+}", "}", route.path)


def _types(operations: Iterable[Operation]) -> Iterable[Any]:
    for one in operations:
        yield from types_of(one.body) + types_of(one.query) + types_of(one.answer)
        yield _error_type(one.shape)
        if one.events is not None:
            yield from (kind for kinds in one.events.types.values() for kind in types_of(kinds))
            yield from map(_error_type, one.events.shapes)


def _operation(operation: Operation, schemas: Schemas, is_guarded: bool) -> Schema:
    made: Schema = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [_header_parameter(name) for name in ("X-Request-Id", *operation.headers) if not name.islower()],
        "responses": _answers(operation, schemas) | _error_answers(operation, schemas, is_guarded),
    }
    if operation.description:
        made["description"] = operation.description
    if operation.query is not None:
        made["parameters"] += schemas.parameters(operation.query)
    if operation.form is not None:
        made["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": operation.form}}}
    if operation.body is not None:
        examples = {name: {"value": body} for name, body in operation.bodies.items()}
        content = {"schema": schemas.of(operation.body), "examples": examples}
        made["requestBody"] = {"required": True, "content": {"application/json": content}}
    return made


# -- answers -----------------------------------------------------------------------------------------------------------


def _answers(operation: Operation, schemas: Schemas) -> Schema:
    content: Schema = {kind: {"schema": {"type": "string"}, "example": text} for kind, text in operation.texts.items()}
    if operation.answer is not None:
        content["application/json"] = {"schema": schemas.of(operation.answer)}
        if operation.example is not None:
            content["application/json"]["example"] = msgspec.json.decode(encode(operation.example))
    if operation.events is not None:
        content["text/event-stream"] = {
            "schema": _event_schema(operation.events, schemas),
            "example": _stream_example(operation.events),
        }
    names = ["x-request-id", *operation.shape.headers, *(name for name in operation.headers if name.islower())]
    names += ["x-ignored-fields"] if operation.body is not None else []
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    answers: Schema = {}
    if content or not operation.is_empty:
        answers["200"] = {"description": "What was asked for", "headers": headers}
        if content:
            answers["200"]["content"] = content
    if operation.is_empty:
        what = "There is nothing after the last event" if content else "It is ended"
        answers["204"] = {"description": what, "headers": headers}
    return answers


def _event_schema(events: Events, schemas: Schemas) -> Schema:
    """The schema of an event, as tools expect it of OpenAPI 3.1: it may have an id and a name, and has data."""

    def one_event(name: str, data: Schema) -> Schema:
        named = {"event": {"const": name}} if name else {}
        return {
            "type": "object",
            "properties": {"id": {"type": "string"}, **named, "data": data},
            "required": [*named, "data"],
        }

    def with_json(name: str, schema: Schema) -> Schema:
        return one_event(name, {"type": "string", "contentMediaType": "application/json", "contentSchema": schema})

    kinds = [with_json(name, schemas.of(kind)) for name, kind in events.types.items()]
    for shape in events.shapes:
        kinds.append(with_json(shape.event, schemas.of(_error_type(shape))))
        if shape.done:
            kinds.append(one_event("", {"const": shape.done.decode().removeprefix("data: ").strip()}))
    return {"anyOf": kinds}


def _stream_example(events: Events) -> str:
    done = events.shapes[0].done.decode()
    parts = [*(event(data, name).decode() for name, data in events.example), *([done] if done else [])]
    if events.example_id:
        parts = [f"id: {events.example_id}:{number}\n{part}" for number, part in enumerate(parts, 1)]
    return "".join(parts)


# -- errors ------------------------------------------------------------------------------------------------------------


def _error_answers(operation: Operation, schemas: Schemas, is_guarded: bool) -> Schema:
    guard = (AuthenticationError,) if is_guarded else ()
    by_status: dict[int, list[type[ShoalError]]] = {}
    for kind in (*_ALWAYS, *guard, *operation.errors):
        by_status.setdefault(http_error(kind("")).status, []).append(kind)
    return {str(status): _error_answer(operation.shape, kinds, schemas) for status, kinds in sorted(by_status.items())}


def _error_answer(shape: ErrorShape, kinds: list[type[ShoalError]], schemas: Schemas) -> Schema:
    rows = [http_error(kind("")) for kind in kinds]
    by_type: dict[Any, list[dict[str, Any]]] = {}
    described = []
    for kind in kinds:
        told_in = OPENAI if issubclass(kind, MalformedRequestError) else shape  # whose path nobody could read
        example = msgspec.to_builtins(told_in.body(kind("what is wrong, the limit, and what would be right")))
        told = example["error"]
        by_type.setdefault(_error_type(told_in), []).append(told)
        meaning = (getdoc(kind) or "").partition("\n\n")[0]
        described.append(f"`{told.get('code', told['type'])}`: {meaning}")
    names = ["x-request-id", *shape.headers]
    names += ["retry-after"] if any(row.retry_after is not None for row in rows) else []
    names += ["www-authenticate"] if AuthenticationError in kinds else []
    schema = {"anyOf": [{"allOf": [schemas.of(kind), _told_apart(some)]} for kind, some in by_type.items()]}
    return {
        "description": "\n\n".join(described),
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in dict.fromkeys(names)},
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _told_apart(some: list[dict[str, Any]]) -> Schema:
    """What the errors of a status have in the fields by which errors are told apart."""
    fields = {name: {"enum": sorted({one[name] for one in some})} for name in ("type", "code") if name in some[0]}
    return {"properties": {"error": {"properties": fields}}}


def _error_type(shape: ErrorShape) -> Any:
    """The type of an API's errors."""
    body = shape.body.func if isinstance(shape.body, partial) else shape.body
    return get_type_hints(body)["return"]


# -- parameters --------------------------------------------------------------------------------------------------------


def _path_parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "description": _PATHS[name], "schema": _TEXT}


def _header_parameter(name: str) -> Schema:
    description, schema = HEADERS[name]
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _header(name: str) -> Schema:
    description, schema = HEADERS[name]
    return {"description": description, "schema": schema}
