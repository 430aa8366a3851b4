"""What the way over HTTP costs: the same work through the server and in process, interleaved."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import gevent

from bench.table import show
from bench.workload import make_engine, make_request
from shoal.loadtest.records import RequestRecord
from shoal.loadtest.server import ServerProcess
from shoal.loadtest.stream import CompletionClient

NUM_STREAMS = 32
NUM_PROMPT_TOKENS = 64
ARGUMENTS = ["--no-enable-prefix-caching"]
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Run:
    """Seconds of wall time, CPU seconds of each process, and MiB of memory that are resident at the end."""

    wall: float
    api: float = 0.0
    engine: float = 0.0
    client: float = 0.0
    api_memory: float = 0.0
    engine_memory: float = 0.0


def run(checkpoint: Path, num_repeats: int, max_tokens: int) -> dict[str, object]:
    """Time NUM_STREAMS concurrent streams of `max_tokens` tokens each way; print a table."""
    prompts = _prompts(checkpoint)
    over_http, in_process = [], []
    for _ in range(num_repeats):
        # One after the other, never both at once: an idle engine's threads may still spin.
        in_process.append(_in_process(checkpoint, max_tokens))
        over_http.append(_over_http(checkpoint, prompts, max_tokens))
    num_tokens = NUM_STREAMS * max_tokens
    http, local = median(r.wall for r in over_http), median(r.wall for r in in_process)
    api_share = median(r.api / r.wall for r in over_http)
    per_token = median(r.api for r in over_http) / num_tokens * 1e6
    rows: list[dict[str, object]] = [
        {"way": "in process", "tokens/s": num_tokens / local},
        {"way": "over HTTP", "tokens/s": num_tokens / http},
    ]
    show(f"server: {NUM_STREAMS} streams of {max_tokens} tokens, median of {num_repeats}", rows)
    # The CPU seconds of the API process over the seconds that the way over HTTP takes longer: how much of the loss they
    # would explain if nothing ran beside them.
    share = median(r.api for r in over_http) / (http - local)
    figures = {
        "http_to_in_process": local / http,
        "api_share_of_overhead": share,
        "api_process_cores": api_share,
        "api_process_us_per_token": per_token,
        "engine_process_cores": median(r.engine / r.wall for r in over_http),
        "client_cores": median(r.client / r.wall for r in over_http),
        "api_process_mib": median(r.api_memory for r in over_http),
        "engine_process_mib": median(r.engine_memory for r in over_http),
    }
    show("server: ratio, share of a core that each process used, resident memory", [figures])
    return {"server": {"rows": rows, **figures}}


def _prompts(checkpoint: Path) -> list[list[int]]:
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    return [make_request(f"s{i}", NUM_PROMPT_TOKENS, 1, vocab_size).token_ids for i in range(NUM_STREAMS)]


def _in_process(checkpoint: Path, max_tokens: int) -> Run:
    """In a fresh process, so that nothing is shared with the client's."""
    code = (
        "import sys; from pathlib import Path; from bench.server import decode_all;"
        "print(decode_all(Path(sys.argv[1]), int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(max_tokens)]
    return Run(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def decode_all(checkpoint: Path, max_tokens: int) -> float:
    """Seconds that the engine alone needs for all requests."""
    core, backend = make_engine(checkpoint, ARGUMENTS)
    for warm in (True, False):
        for index in range(NUM_STREAMS):
            core.scheduler.add(
                make_request(f"s{index}", NUM_PROMPT_TOKENS, 4 if warm else max_tokens, backend.vocab_size)
            )
        began = time.perf_counter()
        while core.scheduler.num_unfinished:
            core.step()
    return time.perf_counter() - began


def start_server(checkpoint: Path, arguments: Sequence[str], folder: Path) -> ServerProcess:
    """`shoal serve` for the length of a `with` block; its log is in the folder."""
    return ServerProcess(["--model", str(checkpoint), *arguments], folder / f"log-{len(list(folder.iterdir()))}")


def _over_http(checkpoint: Path, prompts: list[list[int]], max_tokens: int) -> Run:
    with tempfile.TemporaryDirectory() as folder, start_server(checkpoint, ARGUMENTS, Path(folder)) as server:
        stream_all(server.url, prompts, 4)
        before = (*server.cpu_seconds(), time.process_time())
        wall, num_tokens = stream_all(server.url, prompts, max_tokens)
        after = (*server.cpu_seconds(), time.process_time())
        assert num_tokens == NUM_STREAMS * max_tokens, f"expected {NUM_STREAMS * max_tokens} tokens, got {num_tokens}"
        api, engine, client = (b - a for a, b in zip(before, after, strict=True))
        return Run(wall, api, engine, client, *server.memory())


def stream_all(url: str, prompts: list[list[int]], max_tokens: int) -> tuple[float, int]:
    """A concurrent stream for each prompt: seconds that all took, and the tokens that came."""
    fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [json.dumps({"prompt": p, **fields, "stream_options": {"include_usage": True}}).encode() for p in prompts]
    records = [RequestRecord(request_id=str(number), sent_at=0.0) for number in range(len(prompts))]
    client = CompletionClient(url, timeout_seconds=TIMEOUT_SECONDS)
    began = time.perf_counter()
    gevent.joinall([gevent.spawn(client.stream, *one, time.perf_counter) for one in zip(bodies, records, strict=True)])
    seconds = time.perf_counter() - began
    client.close()
    assert all(record.is_answered for record in records), next(filter(None, (record.error for record in records)))
    return seconds, sum(record.num_output_tokens for record in records)
