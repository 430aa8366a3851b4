"""Shoal over HTTP beside other servers' engines on the same weights, prompts and machine, in one run.

Peers are optional: whichever is installed takes part.  They run in their own processes, without HTTP (which is in
their favour), and hand back the time that all prompts took.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol, Self

from bench.peers.gguf import write_gguf
from bench.server import start_server, stream_all
from bench.table import show
from shoal.loadtest.server import ServerProcess
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import CheckpointError

MODEL = "smollm2-135m"
CONCURRENCIES = (1, 8, 32)
NUM_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Contender:
    """Who takes part in what precision.

    Attributes:
        arguments: of `shoal serve`; None for a peer.
        module: of this package that drives the peer, and the package it needs.
        weights: type of the GGUF file's matrices that a peer is given.
    """

    name: str
    precision: str
    arguments: tuple[str, ...] | None = None
    module: str = ""
    package: str = ""
    weights: str = ""

    @property
    def is_installed(self) -> bool:
        return self.arguments is not None or importlib.util.find_spec(self.package) is not None


INT8 = ("--quantization", "int8", "--kv-cache-dtype", "float16")
CONTENDERS = (
    Contender("Shoal", "float32", ()),
    Contender("Shoal", "float32, KV float16", ("--kv-cache-dtype", "float16")),
    Contender("Shoal", "int8", INT8),
    Contender("llama.cpp", "float32", None, "llama", "llama_cpp", "F32"),
    Contender("llama.cpp", "int8", None, "llama", "llama_cpp", "Q8_0"),
    Contender("OpenVINO GenAI", "float32", None, "openvino", "openvino_genai", "F16"),
    Contender("OpenVINO GenAI", "int8", None, "openvino", "openvino_genai", "Q8_0"),
)


def run(num_repeats: int, max_tokens: int) -> dict[str, object]:
    """Time all contenders in turns at each concurrency; print tokens/s, and Shoal's ratio to the peers."""
    try:
        checkpoint = resolve_checkpoint(MODEL)
    except CheckpointError as error:
        print(f"\npeers: left out: {error.message}")
        return {}
    prompts = _prompts(checkpoint)
    contenders = [contender for contender in CONTENDERS if contender.is_installed]
    seconds: dict[tuple[int, int], list[float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runners = [stack.enter_context(_start(contender, checkpoint, folder)) for contender in contenders]
        for repeat in range(num_repeats + 1):
            for concurrency in CONCURRENCIES:
                for index, runner in enumerate(runners):
                    taken = runner.run(prompts[:concurrency], max_tokens)
                    if repeat > 0:  # the first round warms up
                        seconds.setdefault((index, concurrency), []).append(taken)
    rows = [_row(index, contender, seconds, max_tokens) for index, contender in enumerate(contenders)]
    title = f"{NUM_PROMPT_TOKENS}-token prompts, {max_tokens} new tokens, tokens/s at concurrency"
    show(f"peers: {MODEL}, {title}, median of {num_repeats}; Shoal over HTTP, peers in process", rows)
    ratios = _ratios(rows)
    if ratios:
        show("peers: Shoal is so many times as fast at the same precision", ratios)
    return {"peers": rows, "peer_ratios": ratios}


class Runner(Protocol):
    def run(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Seconds that it takes to add `max_tokens` tokens to each prompt, all at once."""


class ShoalRunner:
    """A server that streams to one client for each prompt."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server

    def __enter__(self) -> Self:
        self._server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.end()

    def run(self, prompts: list[list[int]], max_tokens: int) -> float:
        return stream_all(self._server.url, prompts, max_tokens)[0]


class PeerRunner:
    """A peer's process: one line of JSON in, the seconds it took out."""

    def __init__(self, module: str, weights: Path) -> None:
        command = [sys.executable, "-m", f"bench.peers.{module}", str(weights), str(os.cpu_count())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, prompts: list[list[int]], max_tokens: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # a peer may have things to say of its own
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError("the peer's process ended")


def _start(contender: Contender, checkpoint: Path, folder: Path) -> AbstractContextManager[Runner]:
    if contender.arguments is not None:
        arguments = ["--no-enable-prefix-caching", "--max-num-seqs", "32", *contender.arguments]
        return ShoalRunner(start_server(checkpoint, arguments, folder))
    weights = folder / f"{contender.weights}.gguf"
    if not weights.exists():
        write_gguf(checkpoint, weights, contender.weights)
    return PeerRunner(contender.module, weights)


def _prompts(checkpoint: Path) -> list[list[int]]:
    """Stretches of English text."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:8])
    token_ids = Tokenizer.load(checkpoint).encode(text)
    return [token_ids[i * NUM_PROMPT_TOKENS : (i + 1) * NUM_PROMPT_TOKENS] for i in range(max(CONCURRENCIES))]


def _row(
    index: int, contender: Contender, seconds: dict[tuple[int, int], list[float]], max_tokens: int
) -> dict[str, object]:
    speeds = {f"{n}": n * max_tokens / median(seconds[index, n]) for n in CONCURRENCIES}
    return {"engine": contender.name, "precision": contender.precision, **speeds}


def _ratios(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Shoal's speed over each peer's at the same precision."""
    own = {row["precision"]: row for row in rows if row["engine"] == "Shoal"}
    columns = [str(n) for n in CONCURRENCIES]
    return [
        {"over": row["engine"], "precision": row["precision"]}
        | {column: float(str(own[row["precision"]][column])) / float(str(row[column])) for column in columns}
        for row in rows
        if row["engine"] != "Shoal"
    ]
