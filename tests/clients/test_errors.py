"""Everything that can go wrong before an answer begins, and what is tried again."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest

from shoal.clients import (
    AsyncShoalClient,
    BrokenConnectionError,
    ClientError,
    ProtocolError,
    ShoalClient,
    StatusError,
    TimedOutError,
    UnreachableError,
    UnsendableError,
)
from shoal.clients.transport import retry_after, retry_delay
from tests.clients.conftest import Driver
from tests.clients.fake_server import PATIENCE, Answer, FakeServer, completion, completion_chunks, error_body

OPERATIONS: list[tuple[str, list[Any]]] = [
    ("complete", ["x"]),
    ("chat", [[{"role": "user", "content": "hello"}]]),
    ("models", []),
    ("tokenize", ["x"]),
    ("detokenize", [[1]]),
    ("health", []),
]


@pytest.fixture
def closed_url() -> Iterator[str]:
    """The address of a port that is taken but does not listen, so that connections to it are refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(("method", "args"), OPERATIONS)
def test_every_operation_raises_the_servers_error(
    server: FakeServer, driver: Driver, method: str, args: list[Any]
) -> None:
    server.json(error_body("No such thing", type="not_found", param="model", code="model_not_found"), status=404)
    with pytest.raises(StatusError, match="No such thing") as caught:
        driver.call(method, *args)
    error = caught.value
    assert (error.message, error.type, error.param, error.code) == (
        "No such thing", "not_found", "model", "model_not_found",
    )  # fmt: skip
    assert (error.status, error.retry_after) == (404, None)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 502])
@pytest.mark.parametrize("method", ["complete", "stream_complete"])
def test_what_may_have_been_worked_on_is_not_sent_again(
    server: FakeServer, driver: Driver, status: int, method: str
) -> None:
    server.error(status, "no", Retry_After="0")
    with pytest.raises(StatusError) as caught:
        (driver.stream if method.startswith("stream") else driver.call)(method, "x")
    assert caught.value.status == status
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_what_was_refused_is_sent_again(server: FakeServer, driver: Driver, status: int) -> None:
    for _ in range(2):
        server.error(status, "too many", Retry_After="0")
    server.json(completion("at last"))
    assert driver.call("complete", "x").text == "at last"
    assert len({str(seen.body) for seen in server.requests}) == 1
    assert len(server.requests) == 3


def test_a_refused_stream_is_sent_again(server: FakeServer, driver: Driver) -> None:
    server.error(429, "too many", Retry_After="0")
    server.stream(*completion_chunks("at last"))
    assert driver.stream("stream_complete", "x")[0].text == "at last"


@pytest.mark.parametrize("max_retries", [0, 1])
def test_patience_ends_with_the_last_error(server: FakeServer, driver: Driver, max_retries: int) -> None:
    for attempt in range(max_retries + 1):
        server.error(429, f"refusal {attempt}", Retry_After="0")
    with pytest.raises(StatusError, match=f"refusal {max_retries}") as caught:
        driver.call("complete", "x", settings={"max_retries": max_retries})
    assert caught.value.retry_after == 0
    assert len(server.requests) == max_retries + 1


def test_a_server_that_asks_for_much_patience_gets_none(server: FakeServer, driver: Driver) -> None:
    server.error(429, "come back tomorrow", Retry_After="86400")
    with pytest.raises(StatusError) as caught:
        driver.call("complete", "x")
    assert caught.value.retry_after == 86400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<h1>Bad Gateway</h1>",
        b"[]",
        b"null",
        b'{"error": "text"}',
        b'{"detail": 1}',
        b"\xff\xfe",
        b'{"error": {}}',
    ],
)
def test_an_error_page_of_any_kind_is_quoted(server: FakeServer, driver: Driver, body: bytes) -> None:
    server.answer(Answer(status=502, content_type="text/html", pieces=[body] if body else []))
    with pytest.raises(StatusError, match="HTTP 502 Bad Gateway") as caught:
        driver.call("complete", "x")
    assert body.decode(errors="replace") in caught.value.message


def test_a_numeric_code_is_text(server: FakeServer, driver: Driver) -> None:
    server.json({"error": {"message": "no", "code": 400}}, status=400)
    with pytest.raises(StatusError) as caught:
        driver.call("complete", "x")
    assert (caught.value.code, caught.value.type) == ("400", None)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"choices": [1]}', b"\xff"])
def test_an_answer_that_is_not_a_completion(server: FakeServer, driver: Driver, body: bytes) -> None:
    server.answer(Answer(pieces=[body] if body else []))
    with pytest.raises(ProtocolError, match="/v1/completions"):
        driver.call("complete", "x")


def test_an_answer_that_is_cut(server: FakeServer, driver: Driver) -> None:
    server.answer(Answer(pieces=[b'{"id": '], ending="cut"))
    with pytest.raises(BrokenConnectionError):
        driver.call("complete", "x")
    assert len(server.requests) == 1


def test_a_server_that_is_silent(server: FakeServer, driver: Driver) -> None:
    server.answer(Answer(ending="silence"))
    with pytest.raises(TimedOutError):
        driver.call("complete", "x", settings={"read_timeout": 0.1})
    assert server.disconnected.wait(PATIENCE)


@pytest.mark.parametrize("kind", [ShoalClient, AsyncShoalClient])
@pytest.mark.parametrize(
    ("base_url", "api_key"),
    [
        ("127.0.0.1:8000", None),
        ("localhost:8000", None),
        ("ftp://127.0.0.1", None),
        ("", None),
        ("http://127.0.0.1:port", None),
        ("http://127.0.0.1", "schlüssel"),
        ("http://127.0.0.1", "key\r\nX-Other: 1"),
    ],
)
def test_a_bad_address_or_key(kind: Any, base_url: str, api_key: str | None) -> None:
    with pytest.raises(UnsendableError, match=r"base_url|api_key"):
        kind(base_url, api_key=api_key)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("x", {"temperature": float("nan")}),
        ("x", {"temperature": float("inf")}),
        ("half a \ud83d pair", {}),
        (b"bytes", {}),
    ],
)
@pytest.mark.parametrize("method", ["complete", "stream_complete"])
def test_a_value_that_json_cannot_carry(
    server: FakeServer, driver: Driver, method: str, prompt: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(UnsendableError, match="/v1/completions"):
        (driver.stream if method.startswith("stream") else driver.call)(method, prompt, **options)
    assert server.requests == []


def test_a_server_that_is_not_there(closed_url: str) -> None:
    with (
        ShoalClient(closed_url, max_retries=0) as client,
        pytest.raises(UnreachableError, match=f"cannot connect to {closed_url}"),
    ):
        client.complete("x")


def test_a_server_that_comes_up_late_is_tried_again(closed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with ShoalClient(closed_url, max_retries=3) as client, pytest.raises(UnreachableError):
        client.models()
    assert len(waits) == 3
    assert all(0.25 * 2**i <= wait <= 0.5 * 2**i for i, wait in enumerate(waits))


def test_health_of_a_server_that_is_not_there(closed_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "sleep")
    with ShoalClient(closed_url) as client, pytest.raises(UnreachableError):
        client.health()


def test_retry_after_in_seconds_or_as_a_date() -> None:
    now = 1_700_000_000.0
    assert retry_after(None, now) is None
    assert retry_after("120", now) == 120
    assert retry_after(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after(formatdate(now - 90, usegmt=True), now) == 0
    assert retry_after("soon", now) is None
    assert retry_after("-5", now) is None
    assert retry_after("²", now) is None


def test_the_delay_grows_to_a_limit() -> None:
    delays = [retry_delay(UnreachableError("no"), attempt) or 0 for attempt in range(2000)]
    assert 0.25 <= delays[0] <= 0.5
    assert all(15 <= delay <= 30 for delay in delays[6:])
    assert len(set(delays[6:])) > 1000


@pytest.mark.parametrize(
    "error", [TimedOutError("slow"), BrokenConnectionError("cut"), ProtocolError("what"), StatusError("no", status=500)]
)
def test_no_delay_for_what_must_not_be_sent_again(error: ClientError) -> None:
    assert retry_delay(error, 0) is None
