"""Streams outlive their connections: a client reads on where it stopped, and asking twice is asking once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from httpx_sse import EventSource, ServerSentEvent

from shoal.clients import AsyncShoalClient, BrokenConnectionError, ShoalClient
from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import API_KEYS, StartServer
from tests.e2e.harness import PATIENCE, Server

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
RESUMED = {"x-stream-resume": "true"}
LONG: dict[str, Any] = {"prompt": "Z", "temperature": 0, "ignore_eos": True, "max_tokens": 2000, "stream": True}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, LONG | {"max_tokens": 40, "n": 3, "logprobs": 2, "echo": True}),
    (
        CHATS,
        {"messages": [{"role": "user", "content": "Z"}], "temperature": 0, "ignore_eos": True, "max_tokens": 40}
        | {"stream": True, "n": 2, "stream_options": {"include_usage": True}},
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cycle_folder: Path) -> Iterator[Server]:
    """A server that holds answers for longer than any test takes."""
    folder = tmp_path_factory.mktemp("server")
    options = ("--model", str(cycle_folder), "--num-blocks", "2048", "--resume-grace-seconds", "3000")
    server = Server(folder, *options)
    yield server.wait_ready()
    server.close()


@pytest.fixture(autouse=True)
def _without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def num_aborted(server: Server) -> float:
    return server.metric("request_success_total", finished_reason="abort")


@contextmanager
def sending(
    server: Server, method: str, path: str, body: dict[str, Any] | None = None, **headers: str
) -> Iterator[tuple[httpx.Response, Iterator[ServerSentEvent]]]:
    """A stream and its events; a name of a header has _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with server.http.stream(method, path, json=body, headers=named) as response:
        if not response.is_success:
            response.read()
        yield response, EventSource(response).iter_sse()


def begun(server: Server, path: str, body: dict[str, Any], num_events: int) -> list[ServerSentEvent]:
    """The first events of a stream whose client leaves then."""
    with sending(server, "POST", path, body, **RESUMED) as (response, events):
        assert response.headers["x-stream-resume"] == "true"
        return [next(events) for _ in range(num_events)]


def rest(server: Server, last: ServerSentEvent) -> list[ServerSentEvent]:
    """What follows an event."""
    stream_id = last.id.partition(":")[0]
    with sending(server, "GET", f"/v1/streams/{stream_id}", last_event_id=last.id) as (response, events):
        assert response.headers["x-request-id"] == stream_id
        return list(events)


def said(events: list[ServerSentEvent], *, can_go_on: bool = True) -> list[Any]:
    """What events say, without what differs between two answers; those of a stream that can go on are numbered."""
    assert events[-1].data == "[DONE]"
    chunks = [json.loads(event.data) for event in events[:-1]]
    (stream_id,) = {chunk.pop("id") for chunk in chunks}
    assert [event.id for event in events] == [f"{stream_id}:{n + 1}" if can_go_on else "" for n in range(len(events))]
    for chunk in chunks:
        (chunk.get("usage") or {}).pop("prompt_tokens_details", None)  # the first answer leaves the prompt in the cache
    return [{name: value for name, value in chunk.items() if name not in ("created", "seed")} for chunk in chunks]


def by_choice(chunks: list[Any]) -> list[list[Any]]:
    """Choices may take turns in any way."""
    return [
        [chunk for chunk in chunks if [choice["index"] for choice in chunk["choices"]] == list(index)]
        for index in ((0,), (1,), (2,), ())
    ]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=["completion", "chat"])
def test_a_stream_goes_on_after_any_event(server: Server, path: str, body: dict[str, Any]) -> None:
    with sending(server, "POST", path, body) as (response, events):
        undisturbed = said(list(events), can_go_on=False)
        assert "x-stream-resume" not in response.headers
    for num_events in (1, 2, 3, 17, len(undisturbed)):
        events_so_far = begun(server, path, body, num_events)
        whole = said(events_so_far + rest(server, events_so_far[-1]))
        assert by_choice(whole) == by_choice(undisturbed)
    with sending(server, "GET", f"/v1/streams/{events_so_far[0].id.partition(':')[0]}") as (_, events):
        assert by_choice(said(list(events))) == by_choice(undisturbed)


def test_a_stream_goes_on_while_engines_die(start: StartServer) -> None:
    server = start("--resume-grace-seconds", "3000").wait_ready()
    events = begun(server, COMPLETIONS, LONG | {"max_tokens": 3000}, 3)
    for number in (1, 2):
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.until("another engine", lambda n=number: server.metric("shoal:engine_restarts_total") == n)
        with sending(server, "GET", f"/v1/streams/{events[0].id[:-2]}", last_event_id=events[-1].id) as (_, more):
            events += [next(more) for _ in range(20)]
    events += rest(server, events[-1])
    assert "".join(chunk["choices"][0]["text"] for chunk in said(events)) == cycle_text(3000)
    assert server.metric("request_success_total") == 1


def test_who_comes_back_takes_over(server: Server) -> None:
    body = LONG | {"max_tokens": 12_000}
    with sending(server, "POST", COMPLETIONS, body, **RESUMED) as (response, events):
        first = [next(events) for _ in range(3)]
        path = f"/v1/streams/{response.headers['x-request-id']}"
        with sending(server, "GET", path, last_event_id=first[-1].id) as (_, more):
            assert next(more).id.endswith(":4")
            *_, error, done = events
            assert json.loads(error.data)["error"]["code"] == "stream_expired" and done.data == "[DONE]"
            assert server.http.delete(path).status_code == 204
    assert server.get(path).status_code == server.http.delete(path).status_code == 404
    server.wait_idle()


def test_what_cannot_go_on_says_why(server: Server) -> None:
    (event,) = begun(server, COMPLETIONS, LONG, 1)
    stream_id = event.id.partition(":")[0]
    rest(server, event)
    for last, status in (("nonsense", 400), ("cmpl-other:3", 400), (f"{stream_id}:x", 400), (f"{stream_id}:3000", 204)):
        answer = server.get(f"/v1/streams/{stream_id}", headers={"last-event-id": last})
        assert answer.status_code == status
        assert status == 204 or answer.json()["error"]["param"] == "Last-Event-ID"
    assert server.get("/v1/streams/cmpl-unknown").status_code == 404
    (event,) = begun(server, COMPLETIONS, LONG | {"max_tokens": 12_000, "logprobs": 5}, 1)
    stream_id = event.id.partition(":")[0]
    server.wait_idle()  # that was more than a stream holds, and nobody read it
    with sending(server, "GET", f"/v1/streams/{stream_id}", last_event_id=event.id) as (response, events):
        if response.status_code == 410:  # events that were on their way to the client have been dropped
            assert response.json()["error"]["code"] == "stream_expired"
        else:
            *_, error, _ = events
            assert json.loads(error.data)["error"]["code"] == "slow_client"


def test_grace_ends(start: StartServer) -> None:
    brief = start("--resume-grace-seconds", "0.2").wait_ready()
    (event,) = begun(brief, COMPLETIONS, LONG | {"max_tokens": 12_000}, 1)
    brief.wait_idle()
    assert num_aborted(brief) == 1
    missing = brief.get(f"/v1/streams/{event.id[:-2]}")
    assert missing.status_code == 404 and "0.2 s" in missing.json()["error"]["message"]


def test_without_grace_nothing_is_held(start: StartServer) -> None:
    without = start("--resume-grace-seconds", "0").wait_ready()
    headers = RESUMED | {"idempotency-key": "once"}
    with sending(without, "POST", COMPLETIONS, LONG | {"max_tokens": 12_000}, **headers) as (response, events):
        assert "x-stream-resume" not in response.headers
        event = next(events)
    without.wait_idle()
    assert num_aborted(without) == 1
    assert without.get(f"/v1/streams/{event.id[:-2]}").status_code == 404


# -- idempotency keys --------------------------------------------------------------------------------------------------


def keyed(server: Server, key: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    return server.http.post(COMPLETIONS, json=body, headers={"idempotency-key": key} | (headers or {}))


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_asking_twice_is_asking_once(server: Server, is_stream: bool) -> None:
    key, body = f"twice {is_stream}", LONG | {"max_tokens": 3000, "stream": is_stream, "temperature": 1}
    server.wait_idle()
    num_tokens = server.metric("generation_tokens_total")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: keyed(server, key, body), range(3)))
    answers.append(keyed(server, key, body))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.content for answer in answers}) == 1
    assert len({answer.headers["x-request-id"] for answer in answers}) == 1
    assert server.metric("generation_tokens_total") - num_tokens == 3000
    for other in (body | {"max_tokens": 3001}, {}):
        refused = keyed(server, key, other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    if is_stream:
        stream_id, whole = answers[0].headers["x-request-id"], answers[0].content
        end = keyed(server, key, body, {"last-event-id": f"{stream_id}:1000"}).content
        assert end.startswith(f"id: {stream_id}:1001\n".encode()) and whole.endswith(end)


def test_who_left_before_the_answer_asks_again(server: Server) -> None:
    body = LONG | {"stream": False, "max_tokens": 3000}
    sent, before = json.dumps(body).encode(), num_aborted(server)
    server.wait_idle()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nidempotency-key: left\r\n")
        connection.sendall(b"content-length: %d\r\n\r\n%b" % (len(sent), sent))
        server.until("it runs", lambda: server.metric("num_requests_running") == 1)
    answer = server.http.post(COMPLETIONS, content=sent, headers={"idempotency-key": "left"})
    assert answer.json()["choices"][0]["text"] == cycle_text(3000)
    assert num_aborted(server) == before


def test_what_was_refused_is_not_remembered(server: Server, strict: Server) -> None:
    short = {"prompt": "Z", "max_tokens": 1}
    for _ in range(2):
        assert keyed(server, "refused", {"prompt": "Z", "max_tokens": 10**6}).status_code == 400
    assert keyed(server, "refused", short).status_code == 200
    assert keyed(server, "x" * 256, short).status_code == keyed(server, "", short).status_code == 400
    lost = keyed(server, "lost", LONG, {"last-event-id": "cmpl-of-an-earlier-server:7"})
    assert (lost.status_code, lost.json()["error"]["code"]) == (410, "stream_expired")

    with ExitStack() as full:
        for _ in range(3):
            full.enter_context(strict.streaming(COMPLETIONS, **LONG | {"max_tokens": 12_000}))
        assert keyed(strict, "full", short).status_code == 429
    strict.wait_idle()
    assert keyed(strict, "full", short).status_code == 200


def test_an_answer_belongs_to_its_api_key(strict: Server) -> None:
    body = {"prompt": "Z", "max_tokens": 3, "stream": True}
    ours, theirs = ({"authorization": f"Bearer {key}"} for key in API_KEYS[:2])
    mine = keyed(strict, "mine", body, ours).headers["x-request-id"]
    assert keyed(strict, "mine", body, ours).headers["x-request-id"] == mine
    assert keyed(strict, "mine", body, theirs).headers["x-request-id"] != mine
    path = f"/v1/streams/{mine}"
    assert [strict.get(path, headers=headers).status_code for headers in (ours, theirs)] == [200, 404]
    assert strict.get(path, headers={"authorization": ""}).status_code == 401


# -- clients -----------------------------------------------------------------------------------------------------------


def test_the_official_client_sends_the_headers(server: Server) -> None:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=PATIENCE, http_client=http) as client:
        texts, ids = set(), set()
        for headers in ({}, RESUMED, {"Idempotency-Key": "official"}, {"Idempotency-Key": "official"}):
            chunks = list(
                client.completions.create(
                    model="cycle", prompt="Z", max_tokens=50, temperature=0, stream=True, extra_headers=headers
                )
            )
            texts.add("".join(chunk.choices[0].text for chunk in chunks))
            ids.add(chunks[0].id)
    assert len(texts) == 1 and len(ids) == 3


class CuttingProxy:
    """Passes connections on to a server, and cuts each after a number of bytes of its answer.

    Attributes:
        cuts: how many bytes the next connections let through; the last is for all that follow.
        num_connections: that came.
    """

    def __init__(self, server: Server, cuts: list[int]) -> None:
        self.cuts = cuts
        self.num_connections = 0
        self._port = server.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.num_connections += 1
                most = self.cuts.pop(0) if len(self.cuts) > 1 else self.cuts[0]
                threading.Thread(target=self._serve, args=(client, most), daemon=True).start()

    def _serve(self, client: socket.socket, most: int) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as server:
            threading.Thread(target=self._send, args=(client, server), daemon=True).start()
            while most > 0 and (data := server.recv(min(most, 4096))):
                client.sendall(data)
                most -= len(data)
            for end in (client, server):
                end.shutdown(socket.SHUT_RDWR)

    def _send(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)


async def read_async(url: str, **options: Any) -> str:
    async with AsyncShoalClient(url, read_timeout=PATIENCE) as client:
        return "".join([chunk.text async for chunk in client.stream_complete("Z", **options)])


def read_sync(url: str, **options: Any) -> str:
    with ShoalClient(url, read_timeout=PATIENCE) as client:
        return "".join(chunk.text for chunk in client.stream_complete("Z", **options))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_our_clients_read_on_over_connections_that_are_cut(server: Server, kind: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 300}
    random.seed(7)
    cuts = [400, *(random.randrange(600, 9000) for _ in range(6)), 10**9]
    proxy = CuttingProxy(server, cuts)
    with proxy as url:
        text = asyncio.run(read_async(url, **options)) if kind == "async" else read_sync(url, **options)
    assert text == cycle_text(300)
    assert proxy.num_connections == 8


def test_our_client_gives_up_where_nothing_goes_on(server: Server) -> None:
    before = num_aborted(server)
    proxy = CuttingProxy(server, [1500, 100])
    with proxy as url, pytest.raises(BrokenConnectionError):
        read_sync(url, ignore_eos=True, max_tokens=12_000)
    assert proxy.num_connections == 1 + 2 + 1  # the last told the server so
    server.until("it is ended", lambda: num_aborted(server) == before + 1)


def test_our_client_ends_a_stream_that_it_leaves(server: Server) -> None:
    before = num_aborted(server)
    with ShoalClient(server.url) as client:
        with client.stream_complete("Z", ignore_eos=True, max_tokens=12_000) as stream:
            stream_id = next(stream).id
        assert server.get(f"/v1/streams/{stream_id}").status_code == 404
    server.until("it is ended", lambda: num_aborted(server) == before + 1)
