"""The server keeps to its OpenAPI document: schemathesis makes requests of it, as it allows them and otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.e2e.harness import Server

MOST_TOKENS = 4  # that a request is answered with: what is generated is tested elsewhere
LIMITS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
ENDLESS = "/v1/engine/events"  # an answer that never ends
SHORT_LOAD = {"users": 1, "seconds": 1}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


class Asking:
    """Makes requests of the document of a server, and checks the answers by it."""

    def __init__(self, server: Server) -> None:
        self.document: dict[str, Any] = server.get("/openapi.json").json()
        self.schema: OpenApiSchema = schemathesis.openapi.from_dict(self.document)
        self.schema.config.update(base_url=server.url)
        self.session = requests.Session()

    def operations(self) -> Iterator[APIOperation[Any, Any, Any, Any]]:
        for found in self.schema.get_all_operations():
            if found.ok().path != ENDLESS:
                yield found.ok()

    def ask(self, method: str, path: str, status: int = 200, **parts: Any) -> Any:
        """One request; the answer has this status, and is as the document says."""
        case = self.schema[path][method].Case(**parts)
        answer = case.call_and_validate(session=self.session, checks=CHECKS)
        assert answer.status_code == status, answer.text
        return answer

    def ask_anything(self, operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, count: int) -> None:
        """This many requests that the document allows, or that it does not."""

        @settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            limit = LIMITS.get(operation.path)
            if limit and isinstance(case.body, dict) and _is_much(case.body.get(limit)):
                case.body[limit] = MOST_TOKENS
            if operation.path == "/v1/engine/loads" and isinstance(case.body, dict):
                case.body |= {name: most for name, most in SHORT_LOAD.items() if _is_more(case.body.get(name), most)}
            if operation.path == "/v1/engine/plan" and isinstance(case.body, dict):
                case.body |= {"machine": "h100"} if case.body.get("machine", "auto") == "auto" else {}
            if case.headers and operation.method == "POST":
                case.headers.pop("Last-Event-ID", None)  # nothing else would be looked at
            case.call_and_validate(session=self.session, checks=CHECKS)

        ask()


def _is_much(wanted: object) -> bool:
    return wanted is None or (isinstance(wanted, int) and not 0 <= wanted <= MOST_TOKENS)


def _is_more(wanted: object, most: int) -> bool:
    return wanted is None or (isinstance(wanted, int | float) and wanted > most)


@pytest.fixture(scope="module")
def asking(tiny: Server) -> Iterator[Asking]:
    asking = Asking(tiny)
    with asking.session:
        yield asking


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=["allowed", "not allowed"])
def test_every_answer_is_one_of_the_document(asking: Asking, mode: GenerationMode, count: int) -> None:
    for operation in asking.operations():
        asking.ask_anything(operation, mode, count)


def test_every_example_is_answered(asking: Asking) -> None:
    for path, methods in asking.document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            body, is_batch = dict(example["value"]), "input_file_id" in example["value"]
            if "model" in body:
                body["model"] = "tiny"
            asking.ask("POST", path, status=404 if is_batch else 200, body=body)


def test_what_was_made_is_as_the_document_says(asking: Asking) -> None:
    """Names that nobody can guess."""
    asking.ask("GET", "/v1/models/{name}", path_parameters={"name": "tiny"})
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1}}'
    file = {"file_id": asking.ask("POST", "/v1/files", body={"file": line, "purpose": "batch"}).json()["id"]}
    asking.ask("GET", "/v1/files/{file_id}", path_parameters=file)
    asking.ask("GET", "/v1/files/{file_id}/content", path_parameters=file)
    body = {"input_file_id": file["file_id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = {"batch_id": asking.ask("POST", "/v1/batches", body=body).json()["id"]}
    asking.ask("GET", "/v1/batches/{batch_id}", path_parameters=batch)
    asking.ask("GET", "/v1/batches", query={"limit": 1})
    asking.ask("DELETE", "/v1/files/{file_id}", path_parameters=file)


def test_a_response_is_as_the_document_says(asking: Asking) -> None:
    body = {"input": "the cat", "max_output_tokens": 2, "include": ["message.output_text.logprobs"]}
    answer = asking.ask("POST", "/v1/responses", body=body).json()
    kept = {"response_id": answer["id"]}
    asking.ask("GET", "/v1/responses/{response_id}", path_parameters=kept)
    asking.ask("GET", "/v1/responses/{response_id}", 400, path_parameters=kept, query={"stream": "true"})
    asking.ask("GET", "/v1/responses/{response_id}/input_items", path_parameters=kept, query={"limit": 1})
    asking.ask("POST", "/v1/responses/{response_id}/cancel", 400, path_parameters=kept)
    asking.ask("DELETE", "/v1/responses/{response_id}", path_parameters=kept)
    made = asking.ask("POST", "/v1/responses", body=body | {"background": True}).json()
    kept = {"response_id": made["id"]}
    asking.ask("GET", "/v1/responses/{response_id}", path_parameters=kept, query={"stream": "true"})
    asking.ask("POST", "/v1/responses/{response_id}/cancel", path_parameters=kept)


def test_a_message_is_as_the_document_says(asking: Asking) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2}
    answer = asking.ask("POST", "/v1/messages", body=body)
    assert answer.headers["request-id"] == [answer.json()["id"]]
    asking.ask("POST", "/v1/messages", 404, body=body | {"model": "another"})
    asking.ask("POST", "/v1/messages", 400, body=body | {"max_tokens": -1})


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_held_answer_is_as_the_document_says(asking: Asking, is_stream: bool) -> None:
    headers = {"Idempotency-Key": f"held {is_stream}"}
    body = {"prompt": "the cat", "max_tokens": 2, "stream": is_stream}
    answer = asking.ask("POST", "/v1/completions", body=body, headers=headers)
    stream = {"stream_id": answer.headers["x-request-id"][0]}
    asking.ask("GET", "/v1/streams/{stream_id}", path_parameters=stream)
    if is_stream:
        last = {"Last-Event-ID": answer.text.rpartition("id: ")[2].partition("\n")[0]}
        asking.ask("GET", "/v1/streams/{stream_id}", 204, path_parameters=stream, headers=last)
    other = asking.ask("POST", "/v1/completions", 422, body=body | {"max_tokens": 1}, headers=headers)
    assert other.json()["error"]["code"] == "idempotency_key_reuse"
    asking.ask("DELETE", "/v1/streams/{stream_id}", 204, path_parameters=stream)
