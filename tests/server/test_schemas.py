"""Schemas as clients send them: what a grammar demands in their place is valid by what they say themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher

from shoal.server.llm import LLM, SamplingParams
from shoal.server.schemas import adapted
from tests.e2e.checkpoints import cycle_checkpoint
from tests.schemas import random_schema

COLOURS = {"Colour": {"enum": ["red", "blue"], "title": "Colour", "type": "string"}}
DECIMAL = {
    "anyOf": [{"type": "number", "minimum": 0, "maximum": 9}, {"type": "string", "pattern": r"^(?!^[-+.]*$)\d*$"}]
}
SHORT = {"type": "integer", "minimum": 0, "maximum": 9}


def of_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


# What pydantic, zod and people write, and llguidance refuses as it stands.
TAKEN: list[dict[str, Any]] = [
    of_object(price=DECIMAL),
    of_object(file={"type": "string", "format": "path", "maxLength": 5}, secret={"format": "password", "enum": ["x"]}),
    of_object(tags={"type": "array", "items": SHORT, "uniqueItems": False, "maxItems": 2}),
    of_object(format={"type": "string", "maxLength": 2}, uniqueItems={"const": False}, propertyNames=SHORT),
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": SHORT},
    {"type": "object", "propertyNames": {"const": "a", "type": "string"}, "additionalProperties": SHORT},
    {"type": "object", "propertyNames": {"$ref": "#/$defs/Colour"}, "additionalProperties": SHORT, "$defs": COLOURS},
    {"type": "object", "propertyNames": {"pattern": "^[a-c]{2}$"}, "additionalProperties": SHORT, "maxProperties": 3},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = cycle_checkpoint(tmp_path_factory.mktemp("checkpoints") / "cycle")
    with LLM(str(folder), num_blocks=512, threads=1, max_num_seqs=32, method="off") as one:
        yield one


def has_fault(schema: dict[str, Any]) -> bool:
    return LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema))) != ""


@pytest.mark.parametrize("schema", TAKEN, ids=str)
def test_texts_are_valid_by_the_schema_that_was_sent(llm: LLM, schema: dict[str, Any]) -> None:
    assert has_fault(schema) or schema is TAKEN[3]
    for output in llm.generate(
        ["Z"] * 6, [SamplingParams(seed=i, json_schema=schema, max_tokens=200) for i in range(6)]
    ):
        assert output.finish_reason == "stop"
        jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "propertyNames": {"maxLength": 3}},
        {"type": "object", "propertyNames": {"enum": ["a", 3]}},
        {"type": "object", "propertyNames": {"$ref": "#/$defs/other"}},
        {"type": "object", "propertyNames": {"$ref": "#/$defs/other"}, "$defs": 3},
        {"type": "object", "propertyNames": {"enum": ["a"], "maxLength": 0}},
        {"type": "object", "propertyNames": {"enum": ["a"]}, "properties": {"b": True}},
        {"type": "array", "uniqueItems": True},
        {"not": {"type": "string"}},
    ],
    ids=str,
)
def test_what_cannot_be_demanded_stays_and_is_refused(schema: dict[str, Any]) -> None:
    assert schema.keys() <= adapted(schema).keys()
    assert has_fault(adapted(schema))


def test_names_that_may_be_any_say_nothing() -> None:
    schema = {"type": "object", "additionalProperties": SHORT}
    assert adapted(schema | {"propertyNames": {"type": "string", "title": "Name"}}) == schema


def test_an_object_that_names_its_properties_has_no_others() -> None:
    inner = of_object(b=SHORT)
    assert adapted(of_object(a=inner)) == {
        **of_object(a={**inner, "additionalProperties": False}),
        "additionalProperties": False,
    }
    patterns = {"type": "object", "patternProperties": {"^x": SHORT}}
    assert adapted(patterns) == {**patterns, "additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        of_object(a=SHORT) | {"additionalProperties": SHORT},
        of_object(a=SHORT) | {"required": ["b"]},
        of_object(a=SHORT) | {"minProperties": 2},
        {"allOf": [of_object(a=SHORT), of_object(b=SHORT)]},
        {"$ref": "#/$defs/base", **of_object(a=SHORT), "$defs": {"base": of_object(b=SHORT)}},
        {"anyOf": [of_object(a=SHORT), {"required": ["b"]}], **of_object(b=SHORT)},
        {"properties": 3},
        {"properties": {"a": {}}, "required": [{}]},
    ],
    ids=str,
)
def test_an_object_stays_open_where_others_may_have_to_be_there(schema: dict[str, Any]) -> None:
    assert adapted(schema) == schema


def test_times_have_no_more_digits_than_microseconds() -> None:
    time, moment = {"type": "string", "format": "time"}, {"type": "string", "format": "date-time", "maxLength": 20}
    assert adapted(time) == {**time, "maxLength": 21}
    assert adapted(moment) == moment


def test_what_is_adapted_is_adapted_once() -> None:
    for schema in [*map(random_schema, range(100)), *TAKEN]:
        once = adapted(schema)
        assert adapted(once) == once
