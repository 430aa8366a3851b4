"""Streams as they come over a network: cut anywhere, broken off, with errors in the middle."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import gevent
import pytest

from shoal.loadtest.records import LoadTestError, RequestRecord
from shoal.loadtest.stream import CompletionClient, request_body
from shoal.loadtest.workload import WorkloadRequest
from tests.clients.fake_server import PATIENCE, USAGE, Answer, FakeServer, error_body, sse
from tests.loadtest.streaming_server import closed_port, completion_events

DONE = b"data: [DONE]\n\n"
REQUEST = WorkloadRequest(
    request_id="r", session="r", prompt="Hé", prompt_token_ids=[1, 2], num_output_tokens=3, max_tokens=9, seed=4
)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def record_of(fake: FakeServer, url: str | None = None, timeout_seconds: float = PATIENCE) -> RequestRecord:
    """What is noted of one request; the clock counts how often it was read."""
    record = RequestRecord(request_id="r", sent_at=0.0)
    ticks = itertools.count(1.0)
    client = CompletionClient(url or fake.url, timeout_seconds=timeout_seconds)
    client.stream(request_body(REQUEST), record, lambda: next(ticks))
    close(client)
    return record


def close(client: CompletionClient) -> None:
    client.close()
    gevent.sleep(0)  # gevent closes sockets when its loop comes round


def answer_pieces(fake: FakeServer, *pieces: bytes, ending: str = "end") -> None:
    fake.answer(Answer(content_type="text/event-stream", pieces=list(pieces), ending=ending))


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_a_request_says_all_that_the_workload_does_and_no_more() -> None:
    assert json.loads(request_body(REQUEST)) == {
        "prompt": "Hé",
        "max_tokens": 9,
        "end_after": 3,
        "temperature": 0.0,
        "seed": 4,
        "priority": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_request_names_client_and_objectives_that_it_has(fake: FakeServer) -> None:
    request = WorkloadRequest(
        request_id="r",
        session="r",
        client="me",
        prompt="a",
        prompt_token_ids=[1],
        num_output_tokens=1,
        max_tokens=1,
        temperature=0.8,
        priority=-3,
        ttft_slo_ms=10.0,
        tpot_slo_ms=2.5,
    )
    body = json.loads(request_body(request))
    assert (body["user"], body["priority"], body["ttft_slo_ms"], body["tpot_slo_ms"]) == ("me", -3, 10.0, 2.5)
    assert "stop" not in body


def test_the_path_of_the_url_comes_before_that_of_the_api(fake: FakeServer) -> None:
    fake.stream(*completion_events(["a"]))
    assert record_of(fake, fake.url + "/behind/").error is None
    assert fake.requests[0].path == "/behind/v1/completions"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(LoadTestError, match="http:// or https://"):
        CompletionClient(url, timeout_seconds=1)


# -- whole answers ---------------------------------------------------------------------------------------------------


def test_a_whole_answer_is_noted(fake: FakeServer) -> None:
    events = completion_events(["a", "", "né", "c"])
    events[-1]["usage"] = USAGE
    fake.stream(*events)
    assert record_of(fake) == RequestRecord(
        request_id="r",
        engine_id="cmpl-7-0-0",
        sent_at=0.0,
        accepted_at=1.0,
        token_times=[2.0, 4.0, 5.0, 6.0],  # not the second, which carries nothing, nor the usage
        finished_at=9.0,  # after [DONE]
        num_prompt_tokens=5,
        num_output_tokens=2,
        num_cached_tokens=4,
        num_accepted_tokens=1,
        num_rejected_tokens=3,
        text_hash=sha256("anéc".encode()).hexdigest(),
    )


def whole(texts: list[str]) -> bytes:
    return b"".join(map(sse, completion_events(texts))) + DONE


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100_000])
def test_it_does_not_matter_where_the_network_cuts(fake: FakeServer, size: int) -> None:
    data = whole(["a", "\n\ndata: [DONE]\n\n", "€ né", " "])
    answer_pieces(fake, *(data[i : i + size] for i in range(0, len(data), size)))
    record = record_of(fake)
    assert record.error is None
    assert len(record.token_times) == 5
    assert record.text_hash == sha256("a\n\ndata: [DONE]\n\n€ né ".encode()).hexdigest()


def test_comments_and_other_line_ends_are_understood(fake: FakeServer) -> None:
    answer_pieces(fake, b": ping\n\n", b"event: x\r\n", whole(["a"]).replace(b"\n\n", b"\r\n\r\n"))
    assert record_of(fake).error is None


def test_a_connection_is_used_again(fake: FakeServer) -> None:
    client = CompletionClient(fake.url, timeout_seconds=PATIENCE)
    for _ in range(3):
        fake.stream(*completion_events(["a"]))
        record = RequestRecord(request_id="r", sent_at=0.0)
        client.stream(request_body(REQUEST), record, lambda: 0.0)
        assert record.error is None
    close(client)
    assert len({request.client for request in fake.requests}) == 1


# -- broken ones -----------------------------------------------------------------------------------------------------


def test_a_refusal_is_noted_in_the_words_of_the_server(fake: FakeServer) -> None:
    fake.error(429, "the server is full")
    assert record_of(fake).error == "the server is full"
    fake.answer(Answer(status=502, content_type="text/html", pieces=[b"<html>" + b"x" * 1000]))
    error = record_of(fake).error
    assert error is not None
    assert error.startswith("HTTP 502") and "<html>xxx" in error
    assert len(error) < 400


def test_an_error_in_the_middle_of_a_stream_is_noted_with_what_came_before(fake: FakeServer) -> None:
    fake.stream(completion_events(["a"])[0], error_body("the engine has failed"))
    record = record_of(fake)
    assert record.error == "in the stream: the engine has failed"
    assert record.token_times == [2.0]
    assert record.engine_id == "cmpl-7-0-0"
    assert not (record.error or "").startswith("connection: ")


def test_a_connection_that_is_cut_is_noted_with_what_came_before(fake: FakeServer) -> None:
    fake.stream(*completion_events(["a", "b"])[:2], done=False, ending="cut")
    record = record_of(fake)
    assert (record.error or "").startswith("connection: ")
    assert record.token_times == [2.0, 3.0]
    assert record.finished_at == 4.0


def test_a_connection_that_is_cut_before_the_first_byte_is_noted(fake: FakeServer) -> None:
    answer_pieces(fake, ending="cut")
    assert (record_of(fake).error or "").startswith("connection: ")


def test_a_server_that_is_not_there_is_noted(fake: FakeServer) -> None:
    record = record_of(fake, f"http://127.0.0.1:{closed_port()}")
    assert (record.error or "").startswith("connection: ")
    assert record.finished_at is not None
    assert record.token_times == []


def test_silence_is_noted_and_the_connection_closed(fake: FakeServer) -> None:
    answer_pieces(fake, sse(completion_events(["a"])[0]), ending="silence")
    record = record_of(fake, timeout_seconds=2.0)
    assert record.error == "timeout: the server was silent for 2 s"
    assert record.token_times == [2.0]
    assert fake.disconnected.wait(PATIENCE)


@pytest.mark.parametrize(
    ("events", "done", "message"),
    [
        (completion_events(["a"]), False, "no [DONE] came"),
        (completion_events(["a"])[:1], True, "ended without a finish_reason"),
        ([], True, "ended without a finish_reason"),
        ([], False, "no [DONE] came"),
        ([{"id": "x"}], True, "answered something else than expected (KeyError('choices'))"),
        ([[1]], True, "answered something else than expected"),
        (
            [{"id": "x", "choices": [{"text": None, "finish_reason": None}]}],
            True,
            "answered something else than expected",
        ),
    ],
)
def test_a_stream_that_says_less_than_it_must_is_an_error(
    fake: FakeServer, events: list[Any], done: bool, message: str
) -> None:
    fake.stream(*events, done=done)
    error = record_of(fake).error
    assert error is not None
    assert message in error


def test_a_line_that_is_no_json_is_an_error(fake: FakeServer) -> None:
    answer_pieces(fake, b"data: {\n\n", DONE)
    error = record_of(fake).error
    assert error is not None
    assert "answered something else than expected" in error
