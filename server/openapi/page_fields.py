"""What the page must know of the parameters of its forms: their ranges, defaults and meanings."""

from __future__ import annotations

from shoal.server.openapi.schemas import Schema, Schemas
from shoal.server.wire.engine import PlanBody
from shoal.server.wire.requests import ChatBody, CompletionBody

_KINDS = {"chat": ChatBody, "completion": CompletionBody, "plan": PlanBody}


def describe_fields() -> dict[str, dict[str, Schema]]:
    """By kind of request and by name, the schema of each field that has a meaning."""
    components = Schemas(_KINDS.values(), closed=False).components
    return {
        kind: {name: schema for name, schema in components[body.__name__]["properties"].items() if _is_told(schema)}
        for kind, body in _KINDS.items()
    }


def _is_told(schema: Schema) -> bool:
    return "description" in schema and "another name for" not in schema["description"]
