"""What the way over HTTP costs: the same work through the server and in process, interleaved."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.streams import stream_all
from bench.workload import make_engine, make_request
from shoal.model.checkpoint.load import load_checkpoint
from shoal.terminal import show
from shoal.testing import ServerProcess

CONCURRENCIES = (1, 8, 32, 64)
NUM_PROMPT_TOKENS = 64
ARGUMENTS = ["--no-enable-prefix-caching"]

# One worker, which shares nothing with this process.
fresh_process = partial(ProcessPoolExecutor, 1, get_context("spawn"))


def run(checkpoint: Path, *, repeats: int, max_tokens: int, **_: object) -> dict[str, object]:
    """Time concurrent streams of `max_tokens` tokens each way; print a table."""
    runs: dict[int, list[dict[str, float]]] = {number: [] for number in CONCURRENCIES}
    for _repeat in range(repeats):
        for number, measured in runs.items():
            # One after the other, never both at once: an idle engine's threads may still spin.
            with fresh_process() as process:
                in_process = process.submit(_serve_in_process, checkpoint, number, max_tokens).result()
            measured.append(_serve_over_http(checkpoint, number, max_tokens, *in_process))
    figures = {
        number: {name: median(one[name] for one in measured) for name in measured[0]}
        for number, measured in runs.items()
    }
    title = f"server: streams of {max_tokens} tokens, median of {repeats}"
    show(title, [{"streams": number, **one} for number, one in figures.items()])
    return {"server": figures}


def _serve_in_process(checkpoint: Path, num_streams: int, max_tokens: int) -> tuple[float, float]:
    """Return the seconds that the engine alone needs for all requests, and the median until a first token."""
    core, timed = make_engine(checkpoint, ARGUMENTS)
    for num_tokens in (4, max_tokens):  # the first warms up
        for index in range(num_streams):
            core.scheduler.add(make_request(f"s{index}", NUM_PROMPT_TOKENS, num_tokens, timed.backend.vocab_size))
        firsts: dict[str, float] = {}
        began = time.perf_counter()
        while core.scheduler.num_unfinished:
            news, now = core.step(), time.perf_counter()
            for output in news:
                firsts.setdefault(output.request_id, now - began)
    return time.perf_counter() - began, median(firsts.values())


def _serve_over_http(
    checkpoint: Path, num_streams: int, max_tokens: int, in_process: float, ttft_in_process: float
) -> dict[str, float]:
    """Return the figures of a fresh server, beside the seconds that the same work took in process."""
    vocab_size = load_checkpoint(checkpoint).config.vocab_size
    prompts = [make_request(f"s{i}", NUM_PROMPT_TOKENS, 1, vocab_size).token_ids.tolist() for i in range(num_streams)]
    num_tokens = num_streams * max_tokens
    with (
        TemporaryDirectory() as folder,
        ServerProcess(["--model", str(checkpoint), *ARGUMENTS], Path(folder) / "log") as server,
    ):
        stream_all([server.url], prompts, 4)
        before = (*server.cpu_seconds(), time.process_time())
        wall, ttft = stream_all([server.url], prompts, max_tokens)
        after = (*server.cpu_seconds(), time.process_time())
        api, engine, client = (now - then for now, then in zip(after, before, strict=True))
    return {
        "in process tokens/s": num_tokens / in_process,
        "http tokens/s": num_tokens / wall,
        "http / in process": in_process / wall,
        "ttft in process ms": 1000 * ttft_in_process,
        "ttft http ms": 1000 * ttft,
        "api us/token": api / num_tokens * 1e6,
        "engine us/token": engine / num_tokens * 1e6,
        "client us/token": client / num_tokens * 1e6,
    }
