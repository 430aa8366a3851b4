"""`python -m tests.chaos.cluster`: streams of a cluster on two nodes, whose engines, replicas and links fail.

It prints a table for people and one line of JSON last, and exits with 1 if a stream was lost or differs.  It needs Ray,
and root for the network between the nodes.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import click
import httpx
import psutil

from shoal.terminal import show
from tests.cluster.nodes import Node
from tests.cluster.test_nodes import TwoNodes, two_nodes
from tests.cluster.test_ray import NUM_STREAMS, Stream, until

KINDS = ("engine killed", "replica killed", "engine stopped", "link cut")


@dataclass
class Tally:
    """What came of the faults of one kind.

    Attributes:
        pauses: seconds; the longest of each stream that went on at another engine.
    """

    faults: int = 0
    streams: int = 0
    lost: int = 0
    differing: int = 0
    pauses: list[float] = field(default_factory=list)

    def row(self, kind: str) -> dict[str, object]:
        return {
            "what fails": kind,
            "times": self.faults,
            "streams": self.streams,
            "lost": self.lost,
            "differing": self.differing,
            "moved": len(self.pauses),
            "median pause [s]": round(median(self.pauses or [0.0]), 2),
            "longest [s]": round(max(self.pauses, default=0.0), 2),
        }


@contextmanager
def fault(cluster: TwoNodes, kind: str, node: Node) -> Iterator[None]:
    """Have it happen, and mend afterwards what nobody else would."""
    if kind == "link cut":
        cluster.link.cut()
        yield
        cluster.link.mend()
        return
    engine = next(one for one in node.processes() if "shoal.cluster.process" in one.cmdline())
    victim = psutil.Process(engine.ppid()) if kind == "replica killed" else engine
    victim.send_signal(signal.SIGSTOP if kind == "engine stopped" else signal.SIGKILL)
    yield
    if kind == "engine stopped":
        victim.kill()


def num_resumed(url: str) -> int:
    """How many requests of this API process went on at another engine."""
    found = re.findall(r"^shoal:requests_resumed_total\{.*\} (.+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return sum(int(float(value)) for value in found)


def play(cluster: TwoNodes, kind: str, node: Node, tally: Tally) -> None:
    """A fault while streams come from both engines, each from half of them, through the API process that stays."""
    cluster.whole()
    before = num_resumed(cluster.url)
    streams = [Stream() for _ in range(NUM_STREAMS)]
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        reading = [pool.submit(stream.begin, cluster.url, number) for number, stream in enumerate(streams)]
        until("all streams have begun", lambda: all(stream.text for stream in streams))
        with fault(cluster, kind, node):
            for read in reading:
                if error := read.exception():
                    click.echo(f"{kind}: {error!r}", err=True)
    num_moved = num_resumed(cluster.url) - before
    tally.faults += 1
    tally.streams += NUM_STREAMS
    tally.lost += sum(not stream.is_ended for stream in streams)
    tally.differing += sum(
        stream.is_ended and stream.read != expected
        for stream, expected in zip(streams, cluster.undisturbed, strict=True)
    )
    tally.pauses += sorted(stream.longest_pause for stream in streams)[NUM_STREAMS - num_moved :]


@click.command()
@click.option("--faults", default=50, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, help="Of the nodes on which engines and replicas fail.")
def main(faults: int, seed: int) -> None:
    """Have engines, replicas and links fail in turn under 16 streams, and compare these with undisturbed ones."""
    chosen, loads = random.Random(seed), list[float]()
    tallies = {kind: Tally() for kind in KINDS}
    with two_nodes() as cluster:
        for number in range(faults):
            kind = KINDS[number % len(KINDS)]
            play(cluster, kind, chosen.choice(cluster.nodes), tallies[kind])
            loads.append(os.getloadavg()[0])
    rows = [tally.row(kind) for kind, tally in tallies.items()]
    show(f"{faults} faults under {NUM_STREAMS} streams, at a load of {median(loads):.1f} in the median", rows)
    click.echo(json.dumps(rows))
    sys.exit(any(tally.lost or tally.differing for tally in tallies.values()))


if __name__ == "__main__":
    main()
