"""The official client with files and batches, and a server that is killed in the middle of one."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch, FileObject
from openai.types.chat import ChatCompletion

from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import API_KEYS
from tests.e2e.harness import PATIENCE, Server

ENDS = ("completed", "failed", "expired", "cancelled")
Connect = Callable[..., openai.OpenAI]


@pytest.fixture
def connect() -> Iterator[Connect]:
    with ExitStack() as opened:

        def connect_to(server: Server, key: str = "unused") -> openai.OpenAI:
            http = openai.DefaultHttpxClient(trust_env=False)
            made = openai.OpenAI(
                base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE, http_client=http
            )
            return opened.enter_context(made)

        yield connect_to


def lines(url: str, bodies: dict[str, dict[str, Any]]) -> bytes:
    rows = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name, body in bodies.items()]
    return "\n".join(map(json.dumps, rows)).encode()


def submit(client: openai.OpenAI, url: Any, data: bytes, **options: Any) -> Batch:
    file = client.files.create(file=("lines.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h", **options)


def ended(server: Server, client: openai.OpenAI, batch: Batch) -> Batch:
    found: Batch = server.until(
        "the batch ends", lambda: (now := client.batches.retrieve(batch.id)).status in ENDS and now
    )
    return found


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a file by custom_id, each of which is there once."""
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


def test_from_upload_to_download(main: Server, connect: Connect) -> None:
    client = connect(main)
    messages = [{"role": "user", "content": "Say something."}]
    bodies: dict[str, dict[str, Any]] = {
        "greedy": {"model": "shoal-moe", "messages": messages, "temperature": 0, "max_tokens": 12},
        "sampled": {"messages": messages, "max_tokens": 12, "n": 2, "logprobs": True},
        "seeded": {"messages": messages, "max_tokens": 12, "seed": 3},
        "wrong": {"messages": messages, "max_tokens": 10**6},
    }
    url = "/v1/chat/completions"
    data = lines(url, bodies)
    batch = submit(client, url, data, metadata={"purpose": "test"})
    assert batch.status == "validating" and batch.expires_at == batch.created_at + 24 * 3600
    assert client.files.content(batch.input_file_id).content == data

    batch = ended(main, client, batch)
    assert (batch.status, batch.errors, batch.metadata, batch.model) == (
        "completed",
        None,
        {"purpose": "test"},
        "shoal-moe",
    )
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (4, 3, 1)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert all(times) and times == sorted(times, key=lambda time: time or 0)
    Batch.model_validate(batch.model_dump(), strict=True)
    assert not batch.model_extra

    output = rows(client, batch.output_file_id)
    assert output.keys() == {"greedy", "sampled", "seeded"}
    for name, row in output.items():
        said = row["response"]["body"]
        plain = main.post(url, **bodies[name] | {"seed": said["seed"]}).json()
        assert said["choices"] == plain["choices"] and said.keys() == plain.keys()
        ChatCompletion.model_validate(said)
    (failed,) = rows(client, batch.error_file_id).values()
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("wrong", 400)
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert main.metric("shoal:batch_lines_total", result="completed") >= 3

    names = {file.id: file for file in client.files.list(limit=1)}  # the client walks the pages
    assert names.keys() >= {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    output_file = client.files.retrieve(batch.output_file_id or "")
    assert output_file.purpose == "batch_output" and output_file.bytes == len(
        client.files.content(output_file.id).content
    )
    FileObject.model_validate(output_file.model_dump(), strict=True)
    assert batch.input_file_id not in [file.id for file in client.files.list(purpose="batch_output")]
    assert client.batches.list(limit=1).data[0].id == batch.id
    assert client.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.input_file_id)


def test_a_file_that_is_no_batch(main: Server, connect: Connect) -> None:
    client = connect(main)
    url = "/v1/completions"
    data = lines(url, {"a": {"prompt": "x"}, "b": {"prompt": "x", "stream": True}}) + b"\n{\n" + lines(url, {"a": {}})
    batch = ended(main, client, submit(client, url, data))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors is not None and batch.errors.data is not None
    found = [(error.line, error.code, error.param) for error in batch.errors.data]
    assert found == [
        (2, "invalid_request", "body"),
        (3, "invalid_json_line", None),
        (4, "duplicate_custom_id", "custom_id"),
    ]
    with pytest.raises(openai.BadRequestError, match="failed already"):
        client.batches.cancel(batch.id)


def test_what_is_refused(main: Server, connect: Connect) -> None:
    client = connect(main)
    with pytest.raises(openai.BadRequestError, match="purpose") as wrong:
        client.files.create(file=b"{}", purpose="fine-tune")
    assert wrong.value.param == "purpose"
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        client.files.create(file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="../lock", endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.BadRequestError) as endpoint:
        client.batches.create(input_file_id="x", endpoint="/v1/moderations", completion_window="24h")
    assert endpoint.value.param == "endpoint"
    with pytest.raises(openai.BadRequestError) as window:
        client.batches.create(input_file_id="x", endpoint="/v1/completions", completion_window="0h")  # type: ignore[arg-type]
    assert window.value.param == "completion_window"
    with pytest.raises(openai.BadRequestError) as limit:
        client.batches.list(limit=1000)
    assert limit.value.param == "limit"
    for headers, body in (
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\nno form"),
        ({"content-type": "multipart/form-data"}, b"--x--"),
        ({"content-type": "application/json"}, b'{"file": "x", "purpose": "batch"}'),
        ({"content-type": "application/x-www-form-urlencoded"}, b"file=x&purpose=batch"),
    ):
        answer = main.http.post("/v1/files", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value"), answer.text
    with socket.create_connection(("127.0.0.1", main.port)) as connection:
        head = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        connection.sendall(f"{head}content-length: {201 * 2**20}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096)
    upload = {"file": ("large.jsonl", b"\n" * (5 * 2**20))}  # more than other bodies may have
    assert main.http.post("/v1/files", files=upload, data={"purpose": "batch"}).status_code == 200


def test_a_key_sees_only_its_own(strict: Server, connect: Connect) -> None:
    mine, theirs = connect(strict, API_KEYS[0]), connect(strict, API_KEYS[1])
    batch = submit(mine, "/v1/completions", lines("/v1/completions", {"a": {"prompt": "Z", "max_tokens": 5}}))
    for call in (
        lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id),
        lambda: theirs.files.content(batch.input_file_id),
        lambda: theirs.files.delete(batch.input_file_id),
        lambda: theirs.batches.list(after=batch.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert not theirs.batches.list().data and not theirs.files.list().data
    batch = ended(strict, mine, batch)
    assert rows(mine, batch.output_file_id)["a"]["response"]["body"]["choices"][0]["text"] == cycle_text(5)
    with pytest.raises(openai.AuthenticationError):
        connect(strict, "wrong").files.create(file=b"{}", purpose="batch")


def test_a_batch_that_is_cancelled_frees_the_engine(strict: Server, connect: Connect) -> None:
    client = connect(strict, API_KEYS[0])
    bodies = {f"{i}": {"prompt": "Z", "max_tokens": 15000, "ignore_eos": True, "temperature": 0} for i in range(5)}
    batch = submit(client, "/v1/completions", lines("/v1/completions", bodies))
    strict.until("lines run", lambda: strict.metric("num_requests_running") == 2)
    assert strict.text("Z", max_tokens=4, temperature=0) == cycle_text(4)  # a line gave way
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(strict, client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at is not None
    errors = rows(client, batch.error_file_id)
    assert errors.keys() == bodies.keys()
    assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
    strict.wait_idle()


def test_a_batch_outlives_its_servers(
    tmp_path: Path, cycle_folder: Path, connect: Connect, request: pytest.FixtureRequest
) -> None:
    """One is killed with its engine, and one is told to stop, in the middle; the next goes on."""
    options = ("--model", str(cycle_folder), "--num-blocks", "2048", "--max-num-seqs", "4")
    bodies = {
        f"line-{i}": {"prompt": "Z", "max_tokens": 120 + i, "ignore_eos": True, **({"temperature": 0} if i % 2 else {})}
        for i in range(18)
    }

    def start(name: str) -> Server:
        (tmp_path / name).mkdir()
        server = Server(tmp_path / name, *options, "--data-folder", str(tmp_path / "data"))
        request.addfinalizer(server.close)
        return server

    def counts(client: openai.OpenAI, batch_id: str) -> Any:
        return client.batches.retrieve(batch_id).request_counts

    first = start("first").wait_ready()
    client = connect(first)
    batch = submit(client, "/v1/completions", lines("/v1/completions", bodies))
    first.until("some lines are answered", lambda: counts(client, batch.id).completed >= 5)
    first.kill()
    second = start("second").wait_ready()
    client = connect(second)
    second.until("further lines are answered", lambda: counts(client, batch.id).completed >= 10)
    third = start("third").wait_ready()
    refused = third.get("/v1/batches")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "batches_unavailable")
    second.signal(signal.SIGTERM)
    assert second.wait() == 0
    third.until("it has the folder", lambda: third.get("/v1/batches").status_code == 200)
    client = connect(third)
    batch = ended(third, client, batch)
    assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("completed", len(bodies))
    answers = rows(client, batch.output_file_id)
    assert answers.keys() == bodies.keys()
    for name, row in answers.items():
        said = row["response"]["body"]
        assert said["usage"]["completion_tokens"] == bodies[name]["max_tokens"]
        assert said["choices"][0]["text"] == third.text(**bodies[name] | {"seed": said["seed"]})
    assert not any("Traceback" in server.log for server in (first, second, third))
