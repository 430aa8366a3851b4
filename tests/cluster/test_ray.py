"""A cluster on a real Ray node of this machine, by the commands that its users type; two nodes with `-m long`."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: make test-cluster installs it")

NUM_STREAMS, NUM_TOKENS, PATIENCE = 16, 200, 240.0
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
    """A cluster that is up, and its first API process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.up("2")

    def up(self, replicas: str, *options: str) -> None:
        told = json.loads(shoal(self.folder, "up", "--json", "--replicas", replicas, *options, *SETTINGS).stdout)
        self.url = told["API processes"][0]["url"]
        self.wait_engines(int(replicas))

    def engines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/server_info", timeout=PATIENCE).json()["engines"]
        return [one for one in found if one["is_ready"]]

    def wait_engines(self, count: int) -> None:
        until(f"{count} engines", lambda: len(self.engines()) == count)

    def stream(self, number: int) -> tuple[str, list[Any]]:
        """The text of a stream, and its log-probabilities."""
        text, logprobs = "", []
        body = {
            "prompt": f"def f{number}(",
            "max_tokens": NUM_TOKENS,
            "min_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "seed": number,
            "stream": True,
            "logprobs": 1,
        }
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        text += choice["text"]
                        logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
        return text, logprobs


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
    ("whose", "how"), [("engine", signal.SIGKILL), ("replica", signal.SIGKILL), ("engine", signal.SIGSTOP)]
)
def test_streams_go_on_elsewhere_to_the_bit(cluster: Cluster, whose: str, how: signal.Signals) -> None:
    cluster.wait_engines(2)
    undisturbed = [cluster.stream(number) for number in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(cluster.stream, number) for number in range(NUM_STREAMS)]
        victim = until("an engine works", lambda: next((e for e in cluster.engines() if e["num_unfinished"] > 4), None))
        os.kill(process_of(victim, whose), how)
        assert [stream.result() for stream in streams] == undisturbed
    if how is signal.SIGSTOP:
        os.kill(victim["pid"], signal.SIGKILL)
    cluster.wait_engines(2)


def test_nothing_is_lost_while_engines_come_and_go(cluster: Cluster) -> None:
    undisturbed = [cluster.stream(number) for number in range(NUM_STREAMS)]
    ends = threading.Event()

    def ask(number: int) -> int:
        asked = 0
        while not ends.is_set() or not asked:
            assert cluster.stream(number) == undisturbed[number]
            asked += 1
        return asked

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(ask, number) for number in range(4)]
        try:
            for count in ("3", "1", "2"):
                cluster.up(count)
        finally:
            ends.set()
        assert min(stream.result() for stream in streams) > 0


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
