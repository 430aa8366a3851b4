"""How a route that reads its own body tells OpenAPI about it."""

from __future__ import annotations

from typing import Any

import msgspec


def documented(body: type[msgspec.Struct]) -> dict[str, Any]:
    """The `openapi_extra` of a route.

    Bodies are read by `parse_body` rather than by FastAPI, so that every fault is an error object of OpenAI's API.
    """
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(body)}}}}


def _schema(body: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema with its definitions written out in place, for a fragment has nowhere to keep them."""
    schema = msgspec.json.schema(body)
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rpartition("/")[2]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(value) for value in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = inline(schema)
    return resolved
