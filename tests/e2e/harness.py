"""A real server process, started as its users start it, and a way to speak with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from shoal.testing import ServerProcess

SHOAL = str(Path(sys.executable).parent / "shoal")
PATIENCE = 280.0  # seconds that anything may take on a busy machine; no test measures time


class Server(ServerProcess):
    """`shoal serve` with a log and a folder for temporary files of its own, and a way to speak with it.

    Args:
        folder: an empty folder for both.
        args: command line.
        port: one that is free if not given; 0 leaves the choice to the server.
    """

    def __init__(self, folder: Path, *args: str, port: int | None = None) -> None:
        self.temp = folder / "tmp"
        self.temp.mkdir()
        super().__init__(
            ["--threads", "1", "--max-queue-seconds", "0", *args],  # no test depends on speed
            folder / "log",
            command=(SHOAL, "serve"),
            port=port,
            folder=folder,
            environment=clean_environment(TMPDIR=str(self.temp)),
        )
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    # -- life --------------------------------------------------------------------------------------------------------

    def until(self, what: str, holds: Callable[[], Any]) -> Any:
        """Wait until `holds` is true and return its value; fail with the log if it never is."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if found := holds():
                    return found
            time.sleep(0.02)
        raise AssertionError(f"never happened: {what}; the server's log:\n{self.log}")

    def wait_ready(self, seconds: float = PATIENCE) -> Self:
        if not self.port:
            announced = r"ready after .*: http://127\.0\.0\.1:(\d+)"
            self.port = int(
                self.until("the server says its port", lambda: self.check() or re.search(announced, self.log))[1]
            )
            self.http.base_url = self.url
        super().wait_ready(seconds)
        return self

    def engine_pid(self) -> int:
        """The process id of the engine, once it runs."""
        found: int = self.until("there is an engine process", super().engine_pid)
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the API process alone."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end of the API process; return its exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server does not end; its log:\n{self.log}") from None

    def close(self) -> None:
        self.http.close()
        self.kill()

    # -- requests ----------------------------------------------------------------------------------------------------

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        return self._ok(self.post("/v1/completions", prompt=prompt, **body))

    def chat(self, content: str, **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        return self._ok(self.post("/v1/chat/completions", messages=messages, **body))

    def text(self, prompt: Any, **body: Any) -> str:
        text: str = self.complete(prompt, **body)["choices"][0]["text"]
        return text

    def tokens(self, text: str) -> list[int]:
        answer = self._ok(self.post("/tokenize", prompt=text, add_special_tokens=False))
        token_ids: list[int] = answer["tokens"]
        return token_ids

    @contextlib.contextmanager
    def streaming(self, path: str, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a stream as they come; see `events`."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            yield events(response.iter_lines())

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        with self.streaming(path, **body) as found:
            return list(found)

    @staticmethod
    def _ok(response: httpx.Response) -> dict[str, Any]:
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    # -- metrics -----------------------------------------------------------------------------------------------------

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, whose name may be given without `vllm:`."""
        samples = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name in (name, f"vllm:{name}") and labels.items() <= sample.labels.items()
        ]
        return sum(samples)

    def wait_idle(self) -> None:
        """Wait until no request is left and no block is in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        self.until("the server is idle", lambda: not any(self.metric(name) for name in names))


class Waiting(threading.Thread):
    """A request that is not streamed, in the background."""

    def __init__(self, server: Server, path: str, **body: Any) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._path = path
        self._body = body
        self._response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        headers = self._server.http.headers
        with httpx.Client(base_url=self._server.url, headers=headers, timeout=PATIENCE, trust_env=False) as client:
            self._response = client.post(self._path, json=self._body)

    def answer(self) -> httpx.Response:
        self.join(PATIENCE)
        assert self._response is not None
        return self._response


def events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event but comments; each has one `data:` line, and `[DONE]` is the last."""
    data = (line.removeprefix("data: ") for line in lines if line and not line.startswith(("id: ", ": ")))
    for event in iter(lambda: next(data, "the stream ended without [DONE]"), "[DONE]"):
        yield json.loads(event)
    assert not list(data), "nothing follows [DONE]"


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a stream, of either kind."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def clean_environment(**extra: str) -> dict[str, str]:
    """This environment without the variables that are settings of the server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")} | extra


def command_line(pid: int) -> bytes:
    """The command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def run_shoal(folder: Path, *args: str, **environment: str) -> tuple[int, str]:
    """Run a command of the console script in the folder until it ends; return the exit code and the output."""
    done = subprocess.run(
        [SHOAL, *args],
        cwd=folder,
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout
