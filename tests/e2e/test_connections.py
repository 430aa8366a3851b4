"""What one connection may do, byte by byte: each abuse has its answer or its end, and nobody else notices."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from shoal.testing import ServerProcess
from tests.e2e.harness import PATIENCE, SHOAL, Server, clean_environment

BODY = json.dumps({"prompt": "Z", "max_tokens": 3, "temperature": 0}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cycle_folder: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder, "--model", str(cycle_folder), "--num-blocks", "2048", "--client-timeout-seconds", "1")
    yield server.wait_ready()
    server.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def exchange(server: Server, sent: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes, and read until the server closes."""
    with connect(server.port) as connection:
        connection.sendall(sent)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x00\x01 hello\r\n\r\n", 400, "malformed_request"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "url_too_long"),
        (b"GET /" + b"a" * 20_000_000, 414, "url_too_long"),
        (HEAD + b"x: " + b"a" * 9000 + b"\r\n\r\n", 431, "head_too_large"),
        (HEAD + b"x: " + b"a" * 20_000_000, 431, "head_too_large"),
        (HEAD + b"x: y\r\n" * 200 + b"\r\n", 431, "head_too_large"),
        (HEAD + (b"x: " + b"a" * 4000 + b"\r\n") * 20 + b"\r\n", 431, "head_too_large"),
    ],
    ids=["garbage", "long URL", "endless URL", "long header", "endless header", "many headers", "large head"],
)
def test_a_head_has_limits(server: Server, sent: bytes, status: int, code: str) -> None:
    head, _, body = exchange(server, sent).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == code
    assert "Traceback" not in server.log


@pytest.mark.parametrize("chunks", [b"zz\r\nabc\r\n", b'5\r\n{"pro\r\nzz\r\n'], ids=["first", "second"])
def test_a_body_that_is_not_http_has_its_answer(server: Server, chunks: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = exchange(server, head + chunks)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_request"


def test_half_a_request_is_not_waited_for_without_end(server: Server) -> None:
    halves = [b"", b"GET / HT", HEAD, POST % 100, POST % 100 + b"{"]
    with ThreadPoolExecutor(len(halves)) as pool:
        assert list(pool.map(partial(exchange, server), halves)) == [b""] * len(halves)


def test_a_request_before_a_half_close_is_answered(server: Server) -> None:
    answer = exchange(server, POST % len(BODY) + BODY, half_close=True)
    interim, _, final = answer.rpartition(b"HTTP/1.1 200")
    assert interim in (b"", *(b"HTTP/1.1 100 Continue\r\n\r\n" * count for count in (1, 2)))
    assert b'"text":"' in final


def test_a_client_that_closes_has_left(server: Server) -> None:
    long = json.dumps({"prompt": "Z", "max_tokens": 12_000, "temperature": 0, "ignore_eos": True}).encode()
    with connect(server.port) as connection:
        connection.sendall(POST % len(long) + long)
        server.until("it runs", lambda: server.metric("num_requests_running") == 1)
        server.until("it has some tokens", lambda: server.metric("generation_tokens_total") > 100)
    server.wait_idle()
    assert server.metric("request_success_total", finished_reason="abort") == 1


def test_pipelined_requests_are_answered_in_order_up_to_a_limit(server: Server) -> None:
    one = POST % len(BODY) + BODY
    assert exchange(server, one * 5).count(b"HTTP/1.1 200") == 5
    with connect(server.port) as connection:
        connection.sendall(one * 1000)
        answers = 0
        try:
            while data := connection.recv(65536):
                answers += data.count(b"HTTP/1.1 200")
        except ConnectionResetError:
            pass
    assert answers < 1000
    assert "Traceback" not in server.log


def test_a_body_that_is_not_read_does_not_cost_the_answer(server: Server) -> None:
    sent = [
        b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (path, size) + b"x" * size
        for path, size in ((b"/nowhere", 3_000_000), (b"/tokenize", 30_000_000))
    ]
    with ThreadPoolExecutor(len(sent)) as pool:  # the server waits for some seconds before it closes
        answers = list(pool.map(partial(exchange, server), sent))
    assert [int(answer.split()[1]) for answer in answers] == [404, 413]


@pytest.mark.parametrize("extra", [b"", b"connection: close\r\n"])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("framing", [b"content-length: 4000000", b"transfer-encoding: chunked"])
def test_a_missing_key_is_told_although_the_body_is_still_sent(
    strict: Server, extra: bytes, version: bytes, framing: bytes
) -> None:
    """The client sends all of its body, however long that takes, before it reads."""
    head = b"POST /v1/completions HTTP/%s\r\nhost: localhost\r\n%s%s\r\n\r\n" % (version, extra, framing)
    with connect(strict.port) as connection:
        connection.sendall(head)
        for _ in range(40):
            connection.sendall(b"x" * 100_000 if b"length" in framing else b"186a0\r\n%s\r\n" % (b"x" * 100_000))
            time.sleep(0.01)
        connection.sendall(b"" if b"length" in framing else b"0\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(65536)
        closes = bool(extra) or version == b"1.0"
        if closes:
            assert connection.recv(65536) == b""
        else:
            connection.sendall(HEAD + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 ")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401")
    assert (b"connection: close" in head) == closes
    assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_a_refused_body_is_not_read_for_ever(server: Server) -> None:
    with connect(server.port) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % 10**12)
        while True:
            connection.sendall(b"x" * 1_000_000)


def test_connections_beyond_the_limit_are_told_so(tmp_path: Path, cycle_folder: Path) -> None:
    options = ["--model", str(cycle_folder), "--num-blocks", "2048"]
    shell = ("sh", "-c", f'ulimit -n 200; exec {SHOAL} serve "$@"', "sh")
    environment = clean_environment(TMPDIR=str(tmp_path))
    process = ServerProcess(options, tmp_path / "log", command=shell, environment=environment)
    with process, ExitStack() as stack:
        held = [stack.enter_context(connect(process.port)) for _ in range(150)]
        held[-1].sendall(HEAD + b"\r\n")
        answer = held[-1].recv(65536)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"as many connections as it may" in answer or b"as many connections as it may" in held[-1].recv(65536)
        held[0].sendall(HEAD + b"\r\n")
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200")
        stack.close()
        assert process.wait_ready()
