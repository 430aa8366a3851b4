"""Random JSON schemas of the kinds that people send: each is a function of its seed."""

from __future__ import annotations

from random import Random
from typing import Any

Schema = dict[str, Any]

PATTERNS = (
    "^[a-z]{2,4}$",
    "^(GET|POST) /[a-z]{1,6}$",
    "^[0-9]{3}-[0-9]{4}$",
    r"^\d{1,3}(\.\d{1,2})?$",
    "^#[0-9a-f]{6}$",
)
FORMATS = ("date", "time", "date-time", "uuid", "ipv4")
NAMES = ("id", "name", "größe", "a b", 'quote"d', "city", "score", "tags", "next", "é")


def random_schema(seed: int) -> Schema:
    """An object as a rule, with definitions where something refers to them."""
    rng = Random(seed)
    definitions: Schema = {"leaf": _leaf(rng), "pair": _object(rng, 0, [])}
    if rng.random() < 0.3:
        definitions["list"] = {
            "type": "object",
            "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9}, "next": {"$ref": "#/$defs/list"}},
            "required": ["v"],
            "additionalProperties": False,
        }
    names = sorted(definitions)
    schema = _object(rng, 2, names) if rng.random() < 0.8 else _any(rng, 2, names)
    return schema | {"$defs": definitions}


def _any(rng: Random, depth: int, names: list[str]) -> Schema:
    kinds = [_leaf, _leaf] if depth <= 0 else [_leaf, _leaf, _nested, _nested]
    kind = rng.choice(kinds)
    return kind(rng) if kind is _leaf else _nested(rng, depth - 1, names)


def _leaf(rng: Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(0, 6)},
            {"type": "string", "minLength": 2, "maxLength": 4},
            {"type": "string", "pattern": rng.choice(PATTERNS)},
            {"type": "string", "format": rng.choice(FORMATS)},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 5},
            {"type": "number", "enum": [0.5, -1, 1e3]},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["red", 'gr"een', 3, None, True]},
            {"const": {"a": [1, "b"]}},
            {"type": ["string", "null"], "maxLength": 3},
        ]
    )


def _nested(rng: Random, depth: int, names: list[str]) -> Schema:
    match rng.choice(["object", "object", "array", "tuple", "anyOf", "ref"]):
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": _any(rng, depth, names), "minItems": least, "maxItems": least + 2}
        case "tuple":
            items = [_any(rng, depth, names) for _ in range(rng.randint(1, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        case "anyOf":
            return {"anyOf": [_any(rng, depth, names) for _ in range(rng.randint(1, 3))]}
        case "ref" if names:
            return {"$ref": f"#/$defs/{rng.choice(names)}"}
    return _object(rng, depth, names)


def _object(rng: Random, depth: int, names: list[str]) -> Schema:
    chosen = rng.sample(NAMES, rng.randint(0, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(rng, depth, names) for name in chosen},
        "required": [name for name in chosen if rng.random() < 0.7],
        "additionalProperties": False,
    }
    if rng.random() < 0.3:
        schema |= {"title": "An object", "description": "of some kind", "examples": [{}]}
    return schema
