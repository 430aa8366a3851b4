"""The baseline that people have: Hugging Face's `generate` on padded batches, which needs no server.

A batch has the requests that wait when the one before has ended.  Their prompts are padded on the left to the longest,
every row is computed until the longest output is complete, and all answers come at the end: nothing of a batch is seen
before.  Lengths are those of the workload, which `end_after` enforces in our servers.  Tokens are chosen greedily,
because a call has one temperature for all its rows, and numbers are float32, as in our engine.

As a program, `python -m shoal.loadtest.generate MODEL WORKLOAD RESULTS LOAD MAX_ROWS`, it imports torch and
transformers, which load tests do not need otherwise.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from shoal.loadtest.arrivals import Arrival, closed_sessions, open_arrivals
from shoal.loadtest.records import Load, LoadTestError, RequestRecord, decode
from shoal.loadtest.traffic import Begin, End
from shoal.loadtest.workload import WorkloadRequest, read_workload
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.scheduler.errors import ShoalError
from shoal.testing.server import last_lines

# When it is due, a number that keeps the order, the request, and what its user sends after it.
_Due = tuple[float, int, WorkloadRequest, deque[Arrival]]


def run_generate(model: str, workload: Path, load: Load, results: Path, *, max_rows: int) -> None:
    """Answer a workload in a process of its own.

    Args:
        model: as `shoal serve --model` takes it.
        results: file of what was measured, which grows as batches end; the log is beside it.
        max_rows: most requests of a batch.

    Raises:
        LoadTestError: transformers does not read the model, or the process failed.
    """
    log = results.with_name("generate.log")
    words = [model, str(workload), str(results), msgspec.json.encode(load).decode(), str(max_rows)]
    with log.open("wb") as output:
        command = [sys.executable, "-m", "shoal.loadtest.generate", *words]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False).returncode
    if code:
        raise LoadTestError(f"generate ended with exit code {code}; {last_lines(log)}")


def answer_all(
    requests: Sequence[WorkloadRequest],
    load: Load,
    generate: Callable[[list[WorkloadRequest]], None],
    report: Callable[[RequestRecord], None],
    *,
    max_rows: int,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Answer all requests as a load sends them, a batch at a time.

    Args:
        generate: computes a batch.
        report: is told of each request that was answered; its times count from the call.
        max_rows: most requests of a batch.

    Raises:
        LoadTestError: the load does not suit the workload.
    """
    began = clock()
    sessions = deque(map(deque, closed_sessions(load, requests) if load.users else []))
    waiting: list[_Due] = []
    numbers = count()
    for due, request in [] if load.users else open_arrivals(load, requests):
        waiting.append((due, next(numbers), request, deque()))

    def send_next(now: float, session: deque[Arrival]) -> None:
        """A user goes on with its session, or with another one."""
        session = session or (sessions.popleft() if sessions else session)
        if session:
            pause, request = session.popleft()
            heappush(waiting, (now + pause, next(numbers), request, session))

    for _ in range(load.users):
        send_next(0.0, deque())
    while waiting:
        if (left := waiting[0][0] - (clock() - began)) > 0:
            sleep(left)
            continue
        batch: list[_Due] = []
        while waiting and len(batch) < max_rows and waiting[0][0] <= clock() - began:
            batch.append(heappop(waiting))
        started_at = clock() - began
        generate([request for _, _, request, _ in batch])
        ended_at = clock() - began
        for due, _, request, session in batch:
            record = request.record(due)
            record.accepted_at, record.token_times, record.finished_at = started_at, [ended_at], ended_at
            record.num_prompt_tokens = len(request.prompt_token_ids)
            record.num_output_tokens = request.num_output_tokens
            report(record)
            if load.users:
                send_next(ended_at, session)


def load_model(model: str) -> Any:
    """The checkpoint as transformers reads it, in float32."""
    import torch  # noqa: PLC0415  (only the program needs it)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    path = resolve_checkpoint(model)
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    loaded.generation_config.eos_token_id = None  # lengths are those of the workload
    return loaded


def generate_batch(model: Any, requests: list[WorkloadRequest]) -> Any:
    """The tokens of a padded batch, [num_requests, longest prompt + longest output]."""
    import torch  # noqa: PLC0415

    prompts = [request.prompt_token_ids for request in requests]
    longest, num_tokens = max(map(len, prompts)), max(request.num_output_tokens for request in requests)
    token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": False, "max_new_tokens": num_tokens, "pad_token_id": 0}
    return model.generate(token_ids, attention_mask=mask, **how)


def main(model: str, workload: str, results: str, load: str, max_rows: str) -> None:
    requests, encoder = read_workload(Path(workload)), msgspec.json.Encoder()
    loaded = load_model(model)
    generate_batch(loaded, [msgspec.structs.replace(requests[0], num_output_tokens=4)])  # the first call takes longer
    with Path(results).open("wb", buffering=0) as file:

        def write(line: Any) -> None:
            file.write(encoder.encode(line) + b"\n")

        before = time.process_time()
        write(Begin(started_at=time.monotonic()))
        answer_all(
            requests,
            decode(load.encode(), Load, "load"),
            lambda batch: generate_batch(loaded, batch),
            write,
            max_rows=int(max_rows),
        )
        write(End(cpu_seconds=time.process_time() - before))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ShoalError as error:
        sys.exit(str(error))
