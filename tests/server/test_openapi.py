"""The OpenAPI document: valid, whole, and true to the types that it is made of."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.testclient import TestClient

from shoal.server.app import create_app
from shoal.server.errors import CODES
from shoal.server.metrics import Metrics
from shoal.server.openapi.document import HEADERS
from shoal.server.openapi.fields import FIELDS
from shoal.server.openapi.operations import OPERATIONS
from shoal.server.service import Service
from shoal.server.settings import resolve
from shoal.server.wire.parsing import parse_body
from shoal.server.wire.requests import MAX_CHOICES, MAX_SEED


def client(*, api_keys: tuple[str, ...] = (), **server: Any) -> TestClient:
    settings = resolve({"server": server})
    service = SimpleNamespace(settings=settings, api_keys=api_keys, allowances={}, metrics=Metrics("fish"))
    return TestClient(create_app(cast(Service, service)), base_url="http://localhost")


def document_of(**server: Any) -> dict[str, Any]:
    document: dict[str, Any] = client(**server).get("/openapi.json").json()
    return document


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return document_of()


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All objects in a document."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from nodes(inner)


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def test_it_is_openapi(document: dict[str, Any]) -> None:
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


def test_every_route_is_in_the_table() -> None:
    """And none that is not served."""
    app: Any = client().app
    served = {
        f"{method} {re.sub(r':[a-z]+}', '}', route.path)}"
        for included in app.routes
        for route in included.original_router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert served == OPERATIONS.keys()


def test_every_operation_has_a_name_of_its_own(document: dict[str, Any]) -> None:
    names = [node["operationId"] for node in nodes(document["paths"]) if "operationId" in node]
    assert len(names) == len(set(names)) == len(OPERATIONS)


def test_limits_and_defaults_are_those_of_the_types(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["CompletionBody"]["properties"]
    assert {"maximum": MAX_CHOICES, "minimum": 1, "type": "integer"} in fields["n"]["anyOf"]
    assert fields["n"]["default"] == 1
    assert fields["seed"]["anyOf"][0]["maximum"] == MAX_SEED
    assert fields["n_predict"]["anyOf"] == fields["max_tokens"]["anyOf"]


def test_a_request_may_have_nulls_and_an_answer_has_all_its_fields(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    body = validator(document, schemas["ChatBody"])
    assert body.is_valid({"messages": [{"role": "user", "content": "a", "name": None}], "n": None, "stop": None})
    assert not body.is_valid({"messages": None})
    assert {"usage", "object", "seed"} <= set(schemas["ChatCompletion"]["required"])
    assert "token_ids" not in schemas["ChatChoice"]["required"]


@pytest.mark.parametrize(("unknown_fields", "allowed"), [("ignore", True), ("refuse", False)])
def test_unknown_fields_are_allowed_where_the_server_ignores_them(unknown_fields: str, allowed: bool) -> None:
    document = document_of(unknown_fields=unknown_fields)
    body = validator(document, document["components"]["schemas"]["CompletionBody"])
    assert body.is_valid({"prompt": "a", "fish": 1}) == allowed


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_example_is_what_its_schema_says(document: dict[str, Any], name: str) -> None:
    method, path = name.split(" ")
    made, operation = document["paths"][path][method.lower()], OPERATIONS[name]
    for content in made.get("requestBody", {}).get("content", {}).values():
        for example in content.get("examples", {}).values():
            validator(document, content["schema"]).validate(example["value"])
            assert operation.body is not None
            parse_body(operation.body, msgspec.json.encode(example["value"]))
    for answer in made["responses"].values():
        for kind, content in answer.get("content", {}).items():
            if "example" in content and kind != "text/event-stream":
                validator(document, content["schema"]).validate(content["example"])
            elif kind == "text/event-stream":
                check_stream(document, content)


def check_stream(document: dict[str, Any], content: dict[str, Any]) -> None:
    """Each event of the example is one of those of the schema, with the data that it says."""
    for event in content["example"].removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        fitting = [one for one in content["schema"]["anyOf"] if validator(document, one).is_valid(fields)]
        schemas = [one["properties"]["data"].get("contentSchema") for one in fitting]
        assert any(
            schema is None or validator(document, schema).is_valid(msgspec.json.decode(fields["data"]))
            for schema in sorted(schemas, key=lambda schema: schema is not None)
        )


def test_every_error_has_a_place(document: dict[str, Any]) -> None:
    """But for a wrong method, which is no operation, and a slow client, who is told in its stream."""
    codes = [node["code"] for node in nodes(document) if isinstance(node.get("code"), dict)]
    found = {code for schema in codes for code in schema.get("enum", ())}
    assert set(CODES) - found <= {"method_not_allowed", "slow_client"}


def test_every_meaning_is_of_a_field(document: dict[str, Any]) -> None:
    bodies = {name: one["properties"] for name, one in document["components"]["schemas"].items() if "properties" in one}
    for name in FIELDS:
        kind, _, field = name.rpartition(".")
        assert any(field in bodies[one] for one in ([kind] if kind else bodies)), name


def test_every_header_is_used(document: dict[str, Any]) -> None:
    refs = {node["$ref"].rpartition("/")[2] for node in nodes(document["paths"]) if "$ref" in node}
    parameters = {node["name"] for node in nodes(document["paths"]) if node.get("in") == "header"}
    assert HEADERS.keys() == {name for name in refs if name.islower()} | parameters


def test_keys(document: dict[str, Any]) -> None:
    keyed = client(api_keys=("a-key-of-mine",)).get("/openapi.json").json()
    asked = [{"bearer": []}, {"x-api-key": []}]
    assert keyed["paths"]["/v1/completions"]["post"]["security"] == asked
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{}, *asked]
    assert "security" not in keyed["paths"]["/health"]["get"]
    assert "401" in keyed["paths"]["/v1/models"]["get"]["responses"]
    assert "a-key-of-mine" not in str(keyed)


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside() -> None:
    answer = client(api_keys=("a-key-of-mine",)).get("/docs")
    assert answer.status_code == 200
    assert not re.search(r"https?:|src=|@import|url\(", answer.text)
    policy = answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert f"{tag}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}';" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert " style=" not in answer.text
