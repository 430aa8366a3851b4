"""What scheduling costs: steps with few and many requests waiting, adding a request, and one that waits in memory."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import mean

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import SamplingParams, SchedulingParams, StepResult
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.request import Request
from shoal.scheduler.scheduler import Scheduler
from shoal.terminal import show

NUM_ROWS, NUM_WAITING = 32, (0, 1_000, 10_000)
NUM_PROMPT_TOKENS, MAX_TOKENS, NUM_CLIENTS = 512, 64, 1_000
LIMITS = SchedulerConfig(
    num_blocks=NUM_ROWS * 64, max_model_len=1_024, max_num_seqs=NUM_ROWS, max_num_waiting=2 * max(NUM_WAITING)
)


def run(checkpoint: Path, *, steps: int, repeats: int, **_: object) -> dict[str, object]:
    """Time the scheduler under every policy, with an executor that computes nothing; print a table."""
    rows = [{"policy": name} | _costs(name, steps, repeats) for name in POLICIES]
    show(f"scheduling: {NUM_ROWS} rows, prompts of {NUM_PROMPT_TOKENS} tokens, processor time, best of {repeats}", rows)
    return {"scheduling": rows}


def _costs(policy: str, steps: int, repeats: int) -> dict[str, object]:
    per_step: dict[str, float] = {}
    for count in NUM_WAITING:
        runs = [_step_seconds(policy, count, steps) for _ in range(repeats)]  # the same steps in each
        per_step[f"us a step, {count:,} waiting"] = mean(map(min, zip(*runs, strict=True))) * 1e6
    adding = min(_adding_seconds(policy) for _ in range(repeats)) * 1e6
    return {**per_step, "us to add one": adding, "bytes of one": _waiting_bytes(policy)}


def _step_seconds(policy: str, num_waiting: int, steps: int) -> list[float]:
    """Seconds of `schedule` and `update` in each of many steps.  For each request that ends another one comes."""
    scheduler, requests = _scheduler(policy), _requests()
    seconds: list[float] = []
    now = 0.0
    for _ in range(2 * NUM_ROWS + steps):  # the first ones fill the batch
        while scheduler.num_unfinished < NUM_ROWS + num_waiting:
            scheduler.add(next(requests))
        began = time.process_time()
        output = scheduler.schedule(now)
        result = StepResult([[7] if share.samples else [] for share in output.scheduled])
        scheduler.update(output, result, now)
        seconds.append(time.process_time() - began)
        now += 0.01
    return seconds[-steps:]


def _adding_seconds(policy: str) -> float:
    """Seconds of `add`, the mean over a queue that fills."""
    scheduler, requests = _scheduler(policy), _requests()
    coming = [next(requests) for _ in range(max(NUM_WAITING))]
    gc.collect()
    began = time.process_time()
    for request in coming:
        scheduler.add(request)
    return (time.process_time() - began) / len(coming)


def _waiting_bytes(policy: str) -> int:
    """Memory of a waiting request in the engine."""
    scheduler, requests = _scheduler(policy), _requests()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(NUM_WAITING[1]):
        scheduler.add(next(requests))
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) // NUM_WAITING[1]


def _scheduler(policy: str) -> Scheduler:
    kind = POLICIES[policy]
    return Scheduler(LIMITS, kind(LIMITS, kind.Knobs()))


def _requests() -> Iterator[Request]:
    """Requests without end; no two prompts begin alike."""
    random, number = Random(0), 0
    text = random.choices(range(1_000, 50_000), k=50_000)
    while True:
        prompt = list(map(int, map(str, text[number : number + NUM_PROMPT_TOKENS])))
        params = SamplingParams(max_tokens=MAX_TOKENS + number % MAX_TOKENS, seed=number)
        scheduling = SchedulingParams(client=f"client {number % NUM_CLIENTS}", priority=number % 5)
        yield Request(f"request {number}", prompt, params, number / 1_000, scheduling=scheduling)
        number += 1
