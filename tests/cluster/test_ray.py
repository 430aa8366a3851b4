"""A cluster on a real Ray node of this machine, by the commands that its users type; `make test-cluster` runs all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from shoal.model.checkpoint.find import resolve_checkpoint

pytest.importorskip("ray", reason="Ray is not installed: make test-cluster installs it")

NUM_STREAMS, NUM_TOKENS, PATIENCE = 16, 400, 240.0
READ_SECONDS = 17.0  # a server that lives sends something every 15 s
BIN = Path(sys.executable).parent
SETTINGS = (
    "--num-cpus",
    "0.25",
    "--threads",
    "1",
    "--num-blocks",
    "512",
    "--max-queue-seconds",
    "0",
    "--port",
    "18700",
)


def shoal(folder: Path, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [BIN / "shoal", "cluster", *args],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def until(what: str, holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if found := holds():
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"never happened: {what}")


class Cluster:
    """A cluster that is up.

    Args:
        options: of `up`, each time.

    Attributes:
        url: of its first API process.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.url = ""
        self.up("2")

    def up(self, replicas: str, *options: str) -> None:
        told = shoal(self.folder, "up", "--json", "--replicas", replicas, *SETTINGS, *self.options, *options).stdout
        self.url = json.loads(told)["API processes"][0]["url"]
        self.wait_engines(int(replicas))

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/server_info", timeout=PATIENCE).json()
        return found

    def engines(self) -> list[dict[str, Any]]:
        return [one for one in self.info()["engines"] if one["is_ready"]]

    def servers(self) -> list[dict[str, Any]]:
        """The API processes, the first one before the others."""
        return sorted(self.info()["cluster"]["servers"], key=lambda one: bool(one["url"] != self.url))

    def wait_engines(self, count: int) -> None:
        until(f"{count} engines", lambda: len(self.engines()) == count)

    def stream(self, number: int) -> tuple[str, list[Any]]:
        """The text of a stream, and its log-probabilities."""
        stream = Stream()
        stream.begin(self.url, number)
        assert stream.is_ended
        return stream.read

    def resumed(self, urls: Sequence[str], number: int) -> tuple[str, list[Any]]:
        """The same of a stream that goes on at the next address each time that the connection breaks."""
        stream = Stream()
        for url in urls:
            try:
                if not stream.last_id:
                    stream.begin(url, number)
                else:
                    stream.go_on(url)
            except httpx.TransportError:
                continue
            if stream.is_ended:
                return stream.read
        raise AssertionError("the stream never ended")


class Stream:
    """A stream of completions as far as it was read.

    Attributes:
        last_id: of the last event.
        longest_pause: seconds between two events.
    """

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[Any] = []
        self.last_id = ""
        self.longest_pause = 0.0
        self.is_ended = False

    @property
    def read(self) -> tuple[str, list[Any]]:
        return self.text, self.logprobs

    def begin(self, url: str, number: int) -> None:
        body = {
            "prompt": f"def f{number}(",
            "max_tokens": NUM_TOKENS,
            "min_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "seed": number,
            "stream": True,
            "logprobs": 1,
        }
        self._read("POST", f"{url}/v1/completions", json=body, headers={"x-stream-resume": "true"})

    def go_on(self, url: str) -> None:
        stream_id = self.last_id.rpartition(":")[0]
        self._read("GET", f"{url}/v1/streams/{stream_id}", headers={"last-event-id": self.last_id})

    def _read(self, method: str, url: str, **rest: Any) -> None:
        heard_at = inf
        with httpx.stream(method, url, timeout=httpx.Timeout(PATIENCE, read=READ_SECONDS), **rest) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("id: "):
                    self.last_id = line.removeprefix("id: ")
                if line.startswith("data: {"):
                    before, heard_at = heard_at, time.monotonic()
                    self.longest_pause = max(self.longest_pause, heard_at - before)
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        self.text += choice["text"]
                        self.logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
                self.is_ended = self.is_ended or line == "data: [DONE]"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # the names of Ray's sockets are long
    try:
        yield Cluster(folder)
    finally:
        shoal(folder, "down")
        shutil.rmtree(folder, ignore_errors=True)


def process_of(engine: dict[str, Any], whose: str) -> int:
    """The process of the engine, or of the replica that runs it."""
    process = psutil.Process(engine["pid"])
    return int(process.pid if whose == "engine" else process.ppid())


@pytest.mark.parametrize(
    ("whose", "how"),
    [
        ("engine", signal.SIGKILL),
        pytest.param("replica", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("engine", signal.SIGSTOP, marks=pytest.mark.long),
    ],
)
def test_streams_go_on_elsewhere_to_the_bit(cluster: Cluster, whose: str, how: signal.Signals) -> None:
    cluster.wait_engines(2)
    undisturbed = [cluster.stream(number) for number in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(cluster.stream, number) for number in range(NUM_STREAMS)]
        victim = until("an engine works", lambda: next((e for e in cluster.engines() if e["num_unfinished"] > 2), None))
        os.kill(process_of(victim, whose), how)
        assert [stream.result() for stream in streams] == undisturbed
    if how is signal.SIGSTOP:
        os.kill(victim["pid"], signal.SIGKILL)
    cluster.wait_engines(2)


@pytest.mark.long
def test_streams_of_an_api_process_that_dies_go_on_at_another(cluster: Cluster) -> None:
    cluster.up("2", "--ingresses", "2")
    until("two API processes", lambda: len(cluster.servers()) == 2)
    first, second = (one["url"] for one in cluster.servers())
    undisturbed = [cluster.stream(number) for number in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(cluster.resumed, (second, first), number) for number in range(NUM_STREAMS)]
        until(
            "they run",
            lambda: sum(one["num_unfinished"] for one in httpx.get(f"{second}/server_info").json()["engines"]) > 4,
        )
        os.kill(listener(int(second.rpartition(":")[2])), signal.SIGKILL)
        assert [stream.result() for stream in streams] == undisturbed
    cluster.up("2")


def listener(port: int) -> int:
    """The process that listens there."""
    found = (one.pid for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port)
    return next(pid for pid in found if pid is not None)


@contextmanager
def users(cluster: Cluster, count: int, undisturbed: Sequence[tuple[str, list[Any]]]) -> Iterator[None]:
    """Users who meanwhile ask for one stream after the other, and find each as it was undisturbed."""
    ends = threading.Event()

    def ask(number: int) -> int:
        asked = 0
        while not ends.is_set() or not asked:
            assert cluster.stream(number) == undisturbed[number]
            asked += 1
        return asked

    with ThreadPoolExecutor(count) as pool:
        asking = [pool.submit(ask, number % len(undisturbed)) for number in range(count)]
        try:
            yield
        finally:
            ends.set()
        assert min(user.result() for user in asking) > 0


@pytest.mark.long
def test_nothing_is_lost_while_engines_come_and_go(cluster: Cluster) -> None:
    undisturbed = [cluster.stream(number) for number in range(NUM_STREAMS)]
    with users(cluster, 4, undisturbed):
        for replicas in ("1", "4", "1", "2"):
            cluster.up(replicas)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_serve_asks_the_policy_how_many_engines_there_should_be(cluster: Cluster) -> None:
    """From one engine to four while many wait, and back to one while two users go on."""
    undisturbed = [cluster.stream(number) for number in range(NUM_STREAMS)]
    cluster.up("1", "--max-replicas", "4", "--max-num-seqs", "2")
    with users(cluster, 2, undisturbed):
        with users(cluster, 3 * NUM_STREAMS, undisturbed):
            cluster.wait_engines(4)
        cluster.wait_engines(1)
    cluster.up("2")


@pytest.mark.long
def test_a_cluster_with_other_numbers_takes_over(cluster: Cluster) -> None:
    """A rolling update of a setting by which other numbers are computed: no stream sees both."""
    before = cluster.stream(0)
    fingerprints = set()
    for options in (("--quantization", "int8"), ()):
        cluster.up("2", *options)
        told = json.loads(shoal(cluster.folder, "status", "--json").stdout)
        fingerprints |= {engine["fingerprint"] for engine in told["engines"]}
    assert len(fingerprints) == 2
    assert cluster.stream(0) == before


def test_the_status_is_a_table_and_wrong_settings_are_named(cluster: Cluster) -> None:
    told = shoal(cluster.folder, "status").stdout
    assert re.search(r"http://127\.0\.0\.1:187\d\d", told)
    assert "--engines" not in told
    failed = shoal(cluster.folder, "up", "--engines", "2", code=2)
    assert "engines must be 1: each replica of a cluster has one engine" in failed.stderr


@pytest.mark.long
def test_an_update_that_cannot_start_leaves_the_engines_that_there_are(cluster: Cluster, tmp_path: Path) -> None:
    undisturbed = [cluster.stream(number) for number in range(NUM_STREAMS)]
    before = {engine["pid"] for engine in cluster.engines()}
    torn = tmp_path / "torn"
    shutil.copytree(resolve_checkpoint("shoal-moe"), torn)
    weights = next(torn.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with users(cluster, 4, undisturbed):
        for model, why in (("nowhere", "'nowhere' is neither a checkpoint folder"), (str(torn), str(weights))):
            assert why in shoal(cluster.folder, "up", *SETTINGS, "--model", model, code=2).stderr
    failed = shoal(cluster.folder, "up", *SETTINGS, "--num-blocks", "100000000", code=2)
    assert "the cluster does not come up: num_blocks: a KV cache of 100000000 blocks takes" in failed.stderr
    assert "what was there before goes on" in failed.stderr
    cluster.up("2")
    assert {engine["pid"] for engine in cluster.engines()} == before
    assert cluster.stream(0) == undisturbed[0]
