"""`python -m tests.chaos.overload`: ten times as many requests as a server can serve, beside its full load.

It prints a table for people and one line of JSON last.  What is measured depends on the machine, and is no test.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

import click
import gevent
import numpy as np
from geventhttpclient import HTTPClient

from shoal.testing import ServerProcess

HEADERS = {"content-type": "application/json"}
TIMEOUT_SECONDS = 300.0
HEALTH_SECONDS = 0.05


class Outcome(NamedTuple):
    """How a request ended: its status (0 if there was no answer), and the seconds that took."""

    status: int
    seconds: float
    retry_after: int


class Load:
    """Sends completions of 128 to 384 tokens, and asks for the server's health all the while."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        limits = {"connection_timeout": TIMEOUT_SECONDS, "network_timeout": TIMEOUT_SECONDS}
        self._http = HTTPClient.from_url(server.url, concurrency=1 << 16, **limits)
        self._random = Random(seed)
        self.outcomes: list[Outcome] = []
        self.health: list[Outcome] = []

    def closed(self, users: int, seconds: float) -> None:
        """Full load: each user sends its next request after the answer to the one before."""
        until = time.monotonic() + seconds

        def be_user() -> None:
            while time.monotonic() < until:
                self._complete()

        with self._watching_health():
            gevent.joinall([gevent.spawn(be_user) for _ in range(users)])

    def open(self, rate: float, seconds: float) -> None:
        """A Poisson process of this many requests a second, whatever the server does."""
        sent = []
        due = began = time.monotonic()
        with self._watching_health():
            while due < began + seconds:
                gevent.sleep(max(0.0, due - time.monotonic()))
                sent.append(gevent.spawn(self._complete))
                due += self._random.expovariate(rate)
            gevent.joinall(sent)

    @contextmanager
    def _watching_health(self) -> Iterator[None]:
        watching = gevent.spawn(self._watch_health)
        yield
        watching.kill()

    def _watch_health(self) -> None:
        while True:
            self.health.append(self._ask("GET", "/health", b""))
            gevent.sleep(HEALTH_SECONDS)

    def _complete(self) -> None:
        number = self._random.randrange(1000)
        body = {"prompt": f"def f{number}(x):\n", "max_tokens": 128 + number % 257, "ignore_eos": True, "seed": number}
        self.outcomes.append(self._ask("POST", "/v1/completions", json.dumps(body).encode()))

    def _ask(self, method: str, path: str, body: bytes) -> Outcome:
        began = time.monotonic()
        try:
            with self._http.request(method, path, body, HEADERS) as response:
                response.read()
                status, retry_after = response.status_code, int(str(response.get("retry-after", 0)))
        except OSError:
            status, retry_after = 0, 0
        return Outcome(status, time.monotonic() - began, retry_after)


def p99(outcomes: list[Outcome]) -> float:
    return float(np.quantile([one.seconds for one in outcomes], 0.99))


@click.command()
@click.option("--seconds", default=120.0, show_default=True, help="Of the overload.")
@click.option("--times", default=10.0, show_default=True, help="The rate of arrivals over the capacity.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(seconds: float, times: float, options: tuple[str, ...]) -> None:
    """Overload a server; OPTIONS, after --, are of `shoal serve`."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(["--no-access-log", *options], Path(folder) / "log") as server,
    ):
        Load(server, 0).closed(64, 5.0)  # warms up
        full = Load(server, 1)
        began = time.monotonic()
        full.closed(64, max(10.0, seconds / 4))
        capacity = len(full.outcomes) / (time.monotonic() - began)
        memory, _ = server.memory()
        over = Load(server, 2)
        began = time.monotonic()
        over.open(times * capacity, seconds)
        took = time.monotonic() - began
        memory_after, _ = server.memory()
    served = [one for one in over.outcomes if one.status == 200]
    rows = {
        "capacity [requests/s]": round(capacity, 1),
        "sent": len(over.outcomes),
        "by status": dict(sorted(Counter(one.status for one in over.outcomes).items())),
        "served, of the capacity": round(len(served) / took / capacity, 3),
        "p99 at full load [s]": round(p99(full.outcomes), 3),
        "p99 of the served [s]": round(p99(served), 3),
        "ratio": round(p99(served) / p99(full.outcomes), 2),
        "Retry-After, median [s]": float(
            np.median([one.retry_after for one in over.outcomes if one.status == 429] or [0])
        ),
        "p99 of a refusal [ms]": round(1e3 * p99([one for one in over.outcomes if one.status == 429] or served), 1),
        "p99 of /health [ms]": round(1e3 * p99(over.health), 1),
        "API process before [MiB]": round(memory),
        "API process after [MiB]": round(memory_after),
    }
    for name, value in rows.items():
        click.echo(f"{name:28} {value}")
    click.echo(json.dumps(rows))


if __name__ == "__main__":
    main()
