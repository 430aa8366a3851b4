"""The engine's events and the loads of the page, on a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.checkpoints import LLAMA
from tests.e2e.conftest import API_KEYS, StartServer
from tests.e2e.harness import PATIENCE, SHOAL, Server, Waiting


class Watcher(threading.Thread):
    """Reads the stream of events, and keeps them all: (id, name, data)."""

    def __init__(self, server: Server, last_event_id: str = "") -> None:
        super().__init__(daemon=True)
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.is_over = False
        self._server = server
        self._headers = {**server.http.headers, **({"last-event-id": last_event_id} if last_event_id else {})}
        self._client = httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False)
        self.start()
        self.until(lambda: self.events)

    def run(self) -> None:
        fields: dict[str, str] = {}
        try:
            with self._client.stream("GET", "/v1/engine/events", headers=self._headers) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                for line in answer.iter_lines():
                    if not line:
                        if fields:
                            self.events.append((fields["id"], fields["event"], json.loads(fields["data"])))
                        fields = {}
                    elif not line.startswith(":"):
                        name, _, value = line.partition(": ")
                        fields[name] = value
        except httpx.TransportError:
            pass
        self.is_over = True

    def until(self, holds: Callable[[], Any]) -> Any:
        return self._server.until("the events come", holds)

    def close(self) -> None:
        self._client.close()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [data for _, kind, data in list(self.events) if kind == name]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [data["step"] for data in self.named("step")]

    def rows(self) -> Iterator[list[Any]]:
        """All rows of all steps: row, id, state, ..."""
        return (row for step in self.steps for row in step["batch"])


@pytest.fixture
def watch() -> Iterator[Callable[..., Watcher]]:
    watchers: list[Watcher] = []

    def begin(server: Server, last_event_id: str = "") -> Watcher:
        watchers.append(Watcher(server, last_event_id))
        return watchers[-1]

    yield begin
    for watcher in watchers:
        watcher.close()


def test_a_request_is_seen_from_its_prompt_to_its_end(main: Server, watch: Callable[..., Watcher]) -> None:
    watcher = watch(main)
    assert watcher.events[0][1] == "snapshot"
    assert watcher.events[0][2]["limits"]["num_blocks"] > 0
    done = main.complete("def main(", max_tokens=900, ignore_eos=True)  # long enough to be seen several times
    watcher.until(lambda: any(f"{done['id']}-0-0" in step["left"] for step in watcher.steps))
    mine = [row for row in watcher.rows() if row[1] == f"{done['id']}-0-0"]
    assert {row[2] for row in mine} <= {"prefill", "decode"}
    assert {(row[3], row[5]) for row in mine} == {
        (done["usage"]["prompt_tokens"], done["usage"]["prompt_tokens"] + 900)
    }
    assert sum(step["num_output_tokens"] for step in watcher.steps) >= 900
    parts = [step["parts"] for step in watcher.steps if step["parts"]]
    assert all(part["forward"] > 0 and part["sample"] > 0 for part in parts)
    watcher.until(lambda: any(sum(map(sum, step["experts"] or [])) for step in watcher.steps))


def test_steps_come_one_by_one_when_that_is_asked(main: Server, watch: Callable[..., Watcher]) -> None:
    watcher = watch(main)
    assert main.post("/v1/engine/steps", num_steps=30).status_code == 200
    main.complete("def main(", max_tokens=40, ignore_eos=True, speculation="off")
    watcher.until(lambda: sum(step["num_steps"] == 1 for step in watcher.steps) >= 28)
    numbers = [step["number"] for step in watcher.steps if step["num_steps"] == 1][1:20]
    assert numbers == list(range(numbers[0], numbers[0] + 19))


def test_the_stream_goes_on_with_the_next_engine(start: StartServer, watch: Callable[..., Watcher]) -> None:
    server = start().wait_ready()
    watcher = watch(server)
    waiting = Waiting(server, "/v1/completions", prompt="the cat", max_tokens=6000)
    watcher.until(lambda: list(watcher.rows()))
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert waiting.answer().status_code == 200
    watcher.until(lambda: [data["num_engines"] for data in watcher.named("snapshot")] == [1, 2])
    request_id = f"{waiting.answer().json()['id']}-0-0"
    watcher.until(lambda: any(request_id in step["left"] for step in watcher.steps))
    names = [name for _, name, _ in watcher.events]
    assert names.count("lost") == 1 and names.index("lost") < len(names) - 1 - names[::-1].index("snapshot")
    numbers = [int(one.partition(":")[2]) for one, _, _ in watcher.events]
    assert numbers == list(range(len(numbers)))
    again = watch(server, watcher.events[2][0])
    again.until(lambda: len(again.events) >= len(watcher.events) - 3)
    assert again.events[: len(watcher.events) - 3] == watcher.events[3:]


def test_a_server_that_is_watched_stops_at_once(start: StartServer, watch: Callable[..., Watcher]) -> None:
    server = start().wait_ready()
    watcher = watch(server)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    watcher.join(PATIENCE)
    assert watcher.is_over


def test_each_key_sees_the_tokens_of_its_own_requests(strict: Server, watch: Callable[..., Watcher]) -> None:
    assert httpx.get(f"{strict.url}/v1/engine/events", trust_env=False).status_code == 401
    watcher = watch(strict)
    with strict.streaming("/v1/completions", prompt="the cat", max_tokens=12000, ignore_eos=True) as events:
        next(events)
        watcher.until(lambda: list(watcher.rows()))
        request_id = next(watcher.rows())[1]
        path = f"/v1/engine/requests/{request_id}"
        told = strict.get(path)
        assert told.status_code == 200, told.text
        assert "".join(told.json()["tokens"]).startswith("the cat")
        headers = {"authorization": f"Bearer {API_KEYS[0]}"}
        assert httpx.get(strict.url + path, headers=headers, trust_env=False).status_code == 404
    strict.wait_idle()
    assert strict.get(path).status_code == 404


def test_a_load_runs_alone_under_another_policy(start: StartServer, watch: Callable[..., Watcher]) -> None:
    server = start().wait_ready()
    watcher = watch(server)
    body = {"workload": "mixed", "users": 3, "seconds": 2, "policy": "static"}
    begun = server.post("/v1/engine/loads", **body)
    assert begun.status_code == 200, begun.text
    assert server.post("/v1/engine/loads", **body).status_code == 400
    load = server.until("the load ends", lambda: _finished(server))
    assert (load["state"], load["policy"], load["users"], load["num_failed"]) == ("finished", "static", 3, 0)
    assert load["num_output_tokens"] == sum(load["timeline"]) > 0
    assert {step["policy"] for step in watcher.steps if step["batch"]} == {"static"}
    server.wait_idle()
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    waiting = Waiting(server, "/v1/completions", prompt="the cat", max_tokens=2)
    server.until("it is under way", lambda: server.get("/load").json()["server_load"])
    refused = server.until("a load is refused", lambda: _refusal(server, body))
    os.kill(engine, signal.SIGCONT)
    assert refused["param"] == "policy" and "unfinished" in refused["message"]
    assert waiting.answer().status_code == 200


def test_a_load_can_be_ended(start: StartServer, tmp_path: Path) -> None:
    server = start().wait_ready()
    load_id = server.post("/v1/engine/loads", workload="shared", users=2, seconds=100).json()["id"]
    assert server.http.delete(f"/v1/engine/loads/{load_id}").status_code == 200
    assert server.until("it ends", lambda: _finished(server))["state"] == "cancelled"
    server.wait_idle()
    assert server.http.delete("/v1/engine/loads/none").status_code == 404
    unknown = server.post("/v1/engine/loads", policy="none")
    assert unknown.status_code == 400 and unknown.json()["error"]["param"] == "policy"


def test_a_plan_is_that_of_the_command(main: Server, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    options = ["--machine", "a100", "--context", "512", "--batch", "4", "--tp", "2"]
    command = subprocess.run(
        [SHOAL, "plan", str(tmp_path / "config.json"), *options, "--json"], capture_output=True, check=True
    )
    answer = main.post("/v1/engine/plan", config=LLAMA, machine="a100", context=512, batch=4, tp=2)
    assert answer.status_code == 200, answer.text
    told, expected = answer.json()["plan"], json.loads(command.stdout)
    assert told.pop("model") == "this config.json" and expected.pop("model") == str(tmp_path / "config.json")
    assert told == expected
    (splitting,) = (table for table in answer.json()["tables"] if table["title"].startswith("Splitting"))
    assert splitting["columns"][0] == "ranks" and [row[0] for row in splitting["rows"]] == ["tp 2"]
    served = main.post("/v1/engine/plan", machine="l4").json()["plan"]
    assert served["facts"]["num_parameters"] == main.get("/server_info").json()["num_parameters"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"config": LLAMA | {"hidden_size": None}}, "config", "config.json: hidden_size: missing"),
        ({"config": LLAMA | {"vocab_size": 10**30}}, "config", "vocab_size: expected an integer of at most"),
        ({"config": LLAMA | {"model_type": "<b>fish</b>"}}, "config", "<b>fish</b>"),
        ({"config": LLAMA, "context": 4097}, "context", "the model can have at most 4096 tokens"),
        ({"config": LLAMA, "pp": 33}, "pp", "the model can be split over at most 32"),
        ({"machine": "abacus"}, "machine", "expected 'a100' or 'auto'"),
        ({"batch": 0}, "batch", ">= 1"),
    ],
)
def test_what_cannot_be_planned_is_named(main: Server, body: dict[str, Any], param: str, words: str) -> None:
    answer = main.post("/v1/engine/plan", **{"machine": "h100"} | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


def _refusal(server: Server, body: dict[str, Any]) -> dict[str, Any] | None:
    answer = server.post("/v1/engine/loads", **body)
    error: dict[str, Any] | None = answer.json().get("error")
    return error


def _finished(server: Server) -> dict[str, Any] | None:
    load: dict[str, Any] = server.get("/v1/engine/loads").json()["data"][0]
    return load if load["state"] != "running" else None
