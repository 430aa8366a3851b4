"""What a cluster costs: streams to two engine replicas behind one API process, and to two plain servers, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click

from bench.server import ARGUMENTS, NUM_PROMPT_TOKENS
from bench.streams import stream_all
from bench.workload import make_request
from shoal.model.checkpoint.load import load_checkpoint
from shoal.terminal import show
from shoal.testing import ServerProcess
from shoal.testing.server import free_port

NUM_STREAMS, NUM_LONE = 32, 15
LEAST_RATE, MOST_MS = 0.95, 3.0  # what the cluster is to reach: tokens/s to plain ones, and ms more to a first token


def run(checkpoint: Path, *, repeats: int, max_tokens: int, **_: object) -> dict[str, object]:
    """Time streams of `max_tokens` tokens each way, and the first tokens of lone streams; print a table."""
    if find_spec("ray") is None:
        click.echo("cluster: left out, for Ray is not installed (make test-cluster installs it)")
        return {}
    vocab_size = load_checkpoint(checkpoint).config.vocab_size
    prompts = [make_request(f"s{i}", NUM_PROMPT_TOKENS, 1, vocab_size).token_ids.tolist() for i in range(NUM_STREAMS)]
    options = ["--model", str(checkpoint), "--threads", "1", *ARGUMENTS]
    rates: dict[str, list[float]] = {"plain": [], "cluster": []}
    firsts: dict[str, list[float]] = {"plain": [], "cluster": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="shoal-")))  # short: the names of sockets are long
        servers = [stack.enter_context(ServerProcess(options, folder / f"log{number}")) for number in range(2)]
        ways = {
            "plain": [server.url for server in servers],
            "cluster": [stack.enter_context(_cluster(folder, options))],
        }
        for urls in ways.values():
            stream_all(urls, prompts, 8)  # warms up
        for repeat in range(repeats):
            for name in sorted(ways, reverse=bool(repeat % 2)):
                wall, _first = stream_all(ways[name], prompts, max_tokens)
                rates[name].append(NUM_STREAMS * max_tokens / wall)
            for number in range(NUM_LONE):
                for name in sorted(ways, reverse=bool(number % 2)):
                    _wall, first = stream_all(ways[name][:1], prompts[number : number + 1], 2)
                    firsts[name].append(1000 * first)
    ratio = median(ours / plain for ours, plain in zip(rates["cluster"], rates["plain"], strict=True))
    more = median(ours - plain for ours, plain in zip(firsts["cluster"], firsts["plain"], strict=True))
    show(
        f"cluster: {NUM_STREAMS} streams of {max_tokens} tokens, two engines of one thread; medians of {repeats} pairs",
        [
            {"way": name, "tokens/s": median(rates[name]), "first token of a lone stream, ms": median(firsts[name])}
            for name in ways
        ],
    )
    click.echo(f"tokens/s, cluster to plain: {ratio:.3f} (at least {LEAST_RATE} is wanted)")
    click.echo(f"first token of a lone stream: {more:+.2f} ms (at most {MOST_MS} is wanted)")
    return {"cluster": {"rates": rates, "first_ms": firsts, "rate_ratio": ratio, "first_ms_more": more}}


@contextmanager
def _cluster(folder: Path, options: list[str]) -> Iterator[str]:
    """A cluster of two engine replicas on a Ray node of its own; yields the address of its API process."""

    def command(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-P", "-m", "shoal", "cluster", *words],
            env={**os.environ, "TMPDIR": str(folder)},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    try:
        up = ("up", "--json", "--replicas", "2", "--num-cpus", "0.25", "--port", str(free_port()))
        yield json.loads(command(*up, *options))["API processes"][0]["url"]
    finally:
        command("down")
