"""Shoal over HTTP beside other servers' engines on the same weights, prompts and machine, in one run.

Peers are optional: whichever is installed takes part.  They run in their own processes, without HTTP (which is in
their favour).
"""

from __future__ import annotations

import os
import pydoc_data.topics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.peers.gguf import write_gguf
from bench.server import fresh_process
from bench.streams import stream_all
from bench.timing import seconds
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import CheckpointError
from shoal.terminal import show
from shoal.testing import ServerProcess

MODEL = "smollm2-135m"
OWN_WEIGHTS = "Q4_1"  # of that model
CONCURRENCIES = (1, 8, 32)
NUM_PROMPT_TOKENS = 64
ARGUMENTS = ("--no-enable-prefix-caching", "--max-num-seqs", "32")
KV_FLOAT16 = ("--kv-cache-dtype", "float16")

# The module here that drives a peer, and the package that it needs.
PEERS = {"llama.cpp": ("llama", "llama_cpp"), "OpenVINO GenAI": ("openvino", "openvino_genai")}

# The seconds that it takes to add a number of tokens to each prompt, all at once.
Generate = Callable[[list[list[int]], int], float]


class Contender(NamedTuple):
    """Who takes part.

    Attributes:
        precision: of the weights; those that compute in integers say int8 or int4.
        weights: the type of a GGUF file's matrices; OWN_WEIGHTS for the model's own file.
        arguments: of `shoal serve`.
    """

    engine: str
    precision: str
    weights: str
    arguments: tuple[str, ...] = ()


CONTENDERS = (
    Contender("Shoal", "float32", "F32"),
    Contender("Shoal", "float16", "F16"),
    Contender("Shoal", "Q4_1", OWN_WEIGHTS),
    Contender("Shoal", "bfloat16", "F16", ("--dtype", "bfloat16", *KV_FLOAT16)),
    Contender("Shoal", "int8", "Q8_0", ("--quantization", "int8", *KV_FLOAT16)),
    Contender("Shoal", "int4", OWN_WEIGHTS, ("--quantization", "int4", *KV_FLOAT16)),
    Contender("llama.cpp", "float32", "F32"),
    Contender("llama.cpp", "float16", "F16"),
    Contender("llama.cpp", "Q4_1", OWN_WEIGHTS),
    Contender("llama.cpp", "int8", "Q8_0"),
    Contender("OpenVINO GenAI", "float32", "F16"),
    Contender("OpenVINO GenAI", "bfloat16", "F16"),
    Contender("OpenVINO GenAI", "int8", "Q8_0"),
)


def run(_: Path, *, repeats: int, max_tokens: int, **others: object) -> dict[str, object]:
    """Time all contenders in turns at each concurrency; print tokens/s, and Shoal's ratio to the peers."""
    try:
        checkpoint = resolve_checkpoint(MODEL)
    except CheckpointError as error:
        print(f"\npeers: left out: {error.message}")
        return {}
    prompts = _prompts(checkpoint)
    contenders = [one for one in CONTENDERS if one.engine == "Shoal" or find_spec(PEERS[one.engine][1])]
    speeds: defaultdict[tuple[Contender, int], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ways = [stack.enter_context(_start(one, checkpoint, folder)) for one in contenders]
        for repeat in range(repeats + 1):
            for concurrency in CONCURRENCIES:
                for contender, generate in zip(contenders, ways, strict=True):
                    taken = generate(prompts[:concurrency], max_tokens)
                    if repeat > 0:  # the first round warms up
                        speeds[contender, concurrency].append(concurrency * max_tokens / taken)
    medians = {one: [median(speeds[one, concurrency]) for concurrency in CONCURRENCIES] for one in contenders}
    own = {one.precision: values for one, values in medians.items() if one.engine == "Shoal"}
    rows = [_row("engine", one, values) for one, values in medians.items()]
    ratios = [
        _row("over", one, [ours / theirs for ours, theirs in zip(own[one.precision], values, strict=True)])
        for one, values in medians.items()
        if one.engine != "Shoal"
    ]
    title = f"{NUM_PROMPT_TOKENS}-token prompts, {max_tokens} new tokens, tokens/s at concurrency"
    show(f"peers: {MODEL}, {title}, median of {repeats}; Shoal over HTTP, peers in process", rows)
    if ratios:
        show("peers: tokens/s of Shoal / of the peer at the same precision", ratios)
    return {"peers": rows, "peer_ratios": ratios}


@contextmanager
def _start(contender: Contender, checkpoint: Path, folder: Path) -> Iterator[Generate]:
    weights = checkpoint if contender.weights == OWN_WEIGHTS else folder / f"{contender.weights}.gguf"
    if not weights.exists():
        write_gguf(checkpoint, weights, contender.weights)
    if contender.engine == "Shoal":
        options = ["--model", str(weights), *ARGUMENTS, *contender.arguments]
        with ServerProcess(options, folder / f"{contender.precision}.log") as server:
            yield lambda *work: stream_all([server.url], *work)[0]
    else:
        module, _ = PEERS[contender.engine]
        with fresh_process() as process:
            yield lambda *work: process.submit(_generate, module, weights, contender.precision, *work).result()


def _generate(module: str, weights: Path, precision: str, prompts: list[list[int]], max_tokens: int) -> float:
    """Have a peer generate, in its process."""
    engine = _load(module, weights, precision)
    return seconds(lambda: engine.generate(prompts, max_tokens))


@cache
def _load(module: str, weights: Path, precision: str) -> Any:
    """Load a peer's engine, and keep what the peer prints from the tables."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return import_module(f"bench.peers.{module}").Engine(str(weights), precision, os.cpu_count())


def _prompts(checkpoint: Path) -> list[list[int]]:
    """Stretches of English text."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:8])
    token_ids = Tokenizer.load(checkpoint).encode(text)
    return [token_ids[i * NUM_PROMPT_TOKENS : (i + 1) * NUM_PROMPT_TOKENS] for i in range(max(CONCURRENCIES))]


def _row(column: str, contender: Contender, values: list[float]) -> dict[str, object]:
    named = {str(concurrency): value for concurrency, value in zip(CONCURRENCIES, values, strict=True)}
    return {column: contender.engine, "precision": contender.precision, **named}
