"""Serving the same requests with and without speculation in turns, on one engine."""

from __future__ import annotations

import inspect
import json
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from statistics import fmean, median
from typing import NamedTuple

from bench.workload import TimedBackend
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.output import SamplingParams, SchedulerStats
from shoal.scheduler.request import Request

_FEW = 8  # fewer requests at once than this are served in more pairs of runs
_ROUNDS = 4  # requests that follow each other at each place of the batch
_FUNCTIONS: tuple[Callable[..., object], ...] = (
    textwrap.wrap,
    textwrap.dedent,
    inspect.getdoc,
    inspect.cleandoc,
    inspect.getmodulename,
    json.dumps,
    json.load,
    inspect.unwrap,
)


class Run(NamedTuple):
    """What was counted in a run, its seconds, and the mean of the target's steps without prompts if there were any."""

    counts: Counter[str]
    seconds: float
    step_seconds: float | None

    @property
    def speed(self) -> float:
        return self.counts["tokens"] / self.seconds


def measure(
    engine: tuple[EngineCore, TimedBackend],
    prompts: list[list[int]],
    concurrency: int,
    temperature: float,
    *,
    max_tokens: int,
    repeats: int,
) -> dict[str, float | None]:
    """Serve the same requests with and without speculation in turns, and return figures by name.

    It is a closed loop: when one of `concurrency` requests ends, another one follows.  Speeds and v are medians over
    pairs of runs; the other figures are of all runs with speculation.

    Args:
        prompts: token ids; the requests take them in turns.
        max_tokens: length of the longest request; the shortest is half as long, so that they do not end all at once.
        repeats: number of pairs of runs with eight or more requests at once; with fewer requests there are more.
    """

    def serve(first: int, *, speculates: bool) -> Run:
        requests = []
        for index in range(first, first + _ROUNDS * concurrency):
            num_tokens = max_tokens // 2 + index * 5 % 8 * max_tokens // 14
            params = SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=index)
            prompt = prompts[index % len(prompts)]
            requests.append(Request(f"{index}", prompt, params, time.monotonic(), speculates=speculates))
        return _serve(*engine, requests, concurrency)

    serve(0, speculates=True)  # fills the prefix cache, and lets the adaptive length learn
    pairs = []
    for number in range(repeats * max(1, _FEW // concurrency)):
        order = (True, False) if number % 2 else (False, True)  # so that neither always comes second
        runs = {speculates: serve(number, speculates=speculates) for speculates in order}
        pairs.append((runs[False], runs[True]))
    return _figures(pairs)


def _figures(pairs: list[tuple[Run, Run]]) -> dict[str, float | None]:
    """Summarize pairs of runs without and with speculation."""
    total: Counter[str] = Counter()
    for _, run in pairs:
        total.update(run.counts)
    steps = total["tokens"] - total["accepted"]  # counted for each request apart
    costs = [run.step_seconds / off.step_seconds for off, run in pairs if run.step_seconds and off.step_seconds]
    return {
        "off tokens/s": median(off.speed for off, _ in pairs),
        "speed-up": median(run.speed / off.speed for off, run in pairs),
        "a": min(1.0, total["accepted"] / max(1, total["tried"])),  # chance of a token if all before it are accepted
        "v": median(costs) if costs else None,  # None if every step had a prompt in it
        "steps with one": total["drafts"] / steps,
        "accepted/drafted": total["accepted"] / max(1, total["drafted"]),
        "mean k": total["drafted"] / steps,
        "tokens/step": total["tokens"] / steps,
    }


def _serve(core: EngineCore, target: TimedBackend, requests: Iterable[Request], concurrency: int) -> Run:
    """Serve requests, and count while all places are taken."""
    scheduler, left = core.scheduler, iter(requests)

    def fill() -> None:
        for request in islice(left, concurrency - scheduler.num_unfinished):
            scheduler.add(request)

    fill()
    waiting = set(scheduler.waiting)
    while waiting:  # the first of many may end before the last has begun
        waiting -= {output.request_id for output in core.step()}
        fill()
    drafts, num_tokens, steps, began = _drafts(scheduler.stats()), 0, [], time.perf_counter()
    while scheduler.num_unfinished == concurrency:
        num_tokens += sum(len(output.token_ids) for output in core.step())
        if target.chooses_all:
            steps.append(target.seconds)
        fill()
    seconds = time.perf_counter() - began
    counts = _drafts(scheduler.stats()) - drafts + Counter(tokens=num_tokens)
    while scheduler.num_unfinished:
        core.step()
    return Run(counts, seconds, fmean(steps) if steps else None)


def _drafts(stats: SchedulerStats) -> Counter[str]:
    """Return the counts of proposals so far."""
    accepted = stats.num_accepted_tokens_per_pos
    tried = stats.num_drafts + sum(accepted[:-1])  # a token is tried where the one before was accepted
    return Counter(drafts=stats.num_drafts, drafted=stats.num_draft_tokens, accepted=sum(accepted), tried=tried)


def make_prompts(tokenizer: Tokenizer, *, repeats_itself: bool) -> list[list[int]]:
    """Return beginnings of functions, or functions to be written again with a change, for proposers that look up."""
    prompts = []
    for index, function in enumerate(_FUNCTIONS):
        lines = inspect.getsource(function).splitlines(keepends=True)
        if not repeats_itself:
            text = "".join(lines[: max(2, len(lines) // 3)])
        else:
            task, start = "The same again, with a test behind it", "".join(lines[:2])
            if index % 2 == 0:
                task = "The same function under another name"
                start = start.replace(function.__name__, f"{function.__name__}_2")
            text = f"{''.join(lines[:40])}\n\n# {task}:\n{start}"
        prompts.append(tokenizer.encode(text))
    return prompts
