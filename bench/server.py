"""What the way over HTTP costs: the same work through the server and in process, interleaved."""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import gevent

from bench.workload import make_engine, make_request
from shoal.loadtest.records import RequestRecord
from shoal.loadtest.stream import CompletionClient
from shoal.model.checkpoint.load import load_checkpoint
from shoal.terminal import show
from shoal.testing import ServerProcess

NUM_STREAMS = 32
NUM_PROMPT_TOKENS = 64
ARGUMENTS = ["--no-enable-prefix-caching"]
TIMEOUT_SECONDS = 600.0

# One worker, which shares nothing with this process.
fresh_process = partial(ProcessPoolExecutor, 1, get_context("spawn"))


def run(checkpoint: Path, *, repeats: int, max_tokens: int, **_: object) -> dict[str, object]:
    """Time NUM_STREAMS concurrent streams of `max_tokens` tokens each way; print a table."""
    runs = []
    for _repeat in range(repeats):
        # One after the other, never both at once: an idle engine's threads may still spin.
        with fresh_process() as process:
            in_process = process.submit(_serve_in_process, checkpoint, max_tokens).result()
        runs.append(_serve_over_http(checkpoint, max_tokens, in_process))
    figures = {name: median(one[name] for one in runs) for name in runs[0]}
    title = f"server: {NUM_STREAMS} streams of {max_tokens} tokens, median of {repeats}"
    show(title, [{"figure": name, "median": value} for name, value in figures.items()])
    return {"server": figures}


def _serve_in_process(checkpoint: Path, max_tokens: int) -> float:
    """Return the seconds that the engine alone needs for all requests."""
    core, timed = make_engine(checkpoint, ARGUMENTS)
    for num_tokens in (4, max_tokens):  # the first warms up
        for index in range(NUM_STREAMS):
            core.scheduler.add(make_request(f"s{index}", NUM_PROMPT_TOKENS, num_tokens, timed.backend.vocab_size))
        began = time.perf_counter()
        while core.scheduler.num_unfinished:
            core.step()
    return time.perf_counter() - began


def _serve_over_http(checkpoint: Path, max_tokens: int, in_process: float) -> dict[str, float]:
    """Return the figures of a fresh server, beside the seconds that the same work took in process.

    `api_share_of_overhead` is the API process's CPU time over the time that HTTP adds: how much of the loss it would
    explain if nothing ran beside it.
    """
    vocab_size = load_checkpoint(checkpoint).config.vocab_size
    prompts = [make_request(f"s{i}", NUM_PROMPT_TOKENS, 1, vocab_size).token_ids.tolist() for i in range(NUM_STREAMS)]
    num_tokens = NUM_STREAMS * max_tokens
    started_at = time.perf_counter()
    with (
        TemporaryDirectory() as folder,
        ServerProcess(["--model", str(checkpoint), *ARGUMENTS], Path(folder) / "log") as server,
    ):
        start = time.perf_counter() - started_at
        stream_all(server.url, prompts, 4)
        before = (*server.cpu_seconds(), time.process_time())
        wall = stream_all(server.url, prompts, max_tokens)
        after = (*server.cpu_seconds(), time.process_time())
        api, engine, client = (now - then for now, then in zip(after, before, strict=True))
        api_memory, engine_memory = server.memory()
    return {
        "in_process_tokens_per_s": num_tokens / in_process,
        "http_tokens_per_s": num_tokens / wall,
        "http_to_in_process": in_process / wall,
        "start_seconds": start,
        "api_share_of_overhead": api / (wall - in_process),
        "api_process_cores": api / wall,
        "api_process_us_per_token": api / num_tokens * 1e6,
        "engine_process_cores": engine / wall,
        "client_cores": client / wall,
        "api_process_mib": api_memory,
        "engine_process_mib": engine_memory,
    }


def stream_all(url: str, prompts: list[list[int]], max_tokens: int) -> float:
    """Return the seconds of concurrent streams of `max_tokens` tokens, one for each prompt."""
    fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [json.dumps({"prompt": p, **fields, "stream_options": {"include_usage": True}}).encode() for p in prompts]
    records = [RequestRecord(request_id=str(number), sent_at=0.0) for number in range(len(prompts))]
    client = CompletionClient(url, timeout_seconds=TIMEOUT_SECONDS)
    began = time.perf_counter()
    gevent.joinall([gevent.spawn(client.stream, *one, time.perf_counter) for one in zip(bodies, records, strict=True)])
    seconds = time.perf_counter() - began
    client.close()
    for record in records:
        assert record.error is None, record.error
        assert record.num_output_tokens == max_tokens, f"expected {max_tokens} tokens, got {record.num_output_tokens}"
    return seconds
