"""What speculation gains: each proposer at each concurrency, with fixed and adaptive lengths, against none.

With and without in turns, on one engine: a request says whether tokens are drafted for it.
"""

from __future__ import annotations

import inspect
import json
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

from bench.table import show
from bench.workload import make_engine
from model.tokenizer import Tokenizer
from scheduler.engine import EngineCore
from scheduler.output import SamplingParams, SchedulerStats
from scheduler.request import Request

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS: tuple[int | None, ...] = (2, 4, 8, None)
TEMPERATURES = (0.0, 0.8)
_FUNCTIONS = (
    textwrap.wrap,
    textwrap.dedent,
    inspect.getdoc,
    inspect.cleandoc,
    inspect.getmodulename,
    json.dumps,
    json.load,
    inspect.unwrap,
)


@dataclass(frozen=True)
class Outcome:
    """What came of serving some requests: tokens, seconds, and what the scheduler counted meanwhile."""

    tokens: int
    seconds: float
    drafts: int
    drafted: int
    accepted: int

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    @property
    def steps(self) -> int:
        """Steps of single requests that chose tokens."""
        return self.tokens - self.accepted


def run(checkpoint: Path, methods: tuple[str, ...], repeats: int, max_tokens: int) -> dict[str, object]:
    """Measure every combination; print a table."""
    rows: list[dict[str, object]] = []
    for method in methods:
        prompts = _prompts(Tokenizer.load(checkpoint), repeats_itself=method == "ngram")
        for length in LENGTHS:
            arguments = ["--speculation", method, "--no-enable-prefix-caching"]
            if length is not None:
                arguments += ["--num-spec-tokens", str(length)]
            core, _ = make_engine(checkpoint, arguments)
            for temperature in TEMPERATURES:
                for concurrency in CONCURRENCIES:
                    bench = _Bench(core, prompts, concurrency, temperature, max_tokens)
                    row = {"proposer": method, "k": length or "adaptive", "temperature": temperature}
                    rows.append(row | {"concurrency": concurrency} | bench.measure(repeats))
    show(f"speculation: ratio of tokens/s, on over off, median of {repeats} pairs", rows)
    return {"speculation": rows}


class _Bench:
    def __init__(
        self, core: EngineCore, prompts: list[list[int]], concurrency: int, temperature: float, max_tokens: int
    ) -> None:
        self._core, self._prompts = core, prompts
        self._concurrency, self._temperature, self._max_tokens = concurrency, temperature, max_tokens
        self._numbers = count()

    def measure(self, repeats: int) -> dict[str, object]:
        """Serve the same requests with and without, in turns."""
        self._serve(speculates=True)  # the adaptive rule gets to know the machine
        pairs = [(self._serve(speculates=False), self._serve(speculates=True)) for _ in range(repeats)]
        on = [pair[1] for pair in pairs]
        drafted, accepted = sum(one.drafted for one in on), sum(one.accepted for one in on)
        return {
            "off tokens/s": median(one.speed for one, _ in pairs),
            "speed-up": median(other.speed / one.speed for one, other in pairs),
            "acceptance": accepted / drafted if drafted else 0.0,
            "mean k": drafted / sum(one.steps for one in on),
            "tokens/step": sum(one.tokens for one in on) / sum(one.steps for one in on),
        }

    def _serve(self, *, speculates: bool) -> Outcome:
        scheduler = self._core.scheduler
        before = scheduler.stats()
        for index in range(self._concurrency):
            prompt = self._prompts[index % len(self._prompts)]
            params = SamplingParams(max_tokens=self._max_tokens, temperature=self._temperature, seed=index)
            request_id = f"{next(self._numbers)}"
            scheduler.add(Request(request_id, prompt, params, time.monotonic(), speculates=speculates))
        tokens, seconds = _drain(self._core)
        return _outcome(tokens, seconds, before, scheduler.stats())


def _drain(core: EngineCore) -> tuple[int, float]:
    """Tokens and seconds from the moment on that all requests have their first token."""
    waiting, tokens, began = set(core.scheduler.waiting), 0, 0.0
    while core.scheduler.num_unfinished:
        news = core.step()
        if waiting:
            waiting -= {output.request_id for output in news}
            began = time.perf_counter()
        else:
            tokens += sum(len(output.token_ids) for output in news)
    return tokens, time.perf_counter() - began


def _outcome(tokens: int, seconds: float, before: SchedulerStats, after: SchedulerStats) -> Outcome:
    accepted = sum(after.num_accepted_tokens_per_pos) - sum(before.num_accepted_tokens_per_pos)
    drafted = after.num_draft_tokens - before.num_draft_tokens
    return Outcome(tokens, seconds, after.num_drafts - before.num_drafts, drafted, accepted)


def _prompts(tokenizer: Tokenizer, *, repeats_itself: bool) -> list[list[int]]:
    """Functions to go on from; or, for proposers that look things up, functions to be written again with a change."""
    return [tokenizer.encode(text) for text in (_edits() if repeats_itself else _beginnings())]


def _beginnings() -> Iterator[str]:
    for function in _FUNCTIONS:
        lines = inspect.getsource(function).splitlines(keepends=True)
        yield "".join(lines[: max(2, len(lines) // 3)])


def _edits() -> Iterator[str]:
    for function in _FUNCTIONS:
        source = "".join(inspect.getsource(function).splitlines(keepends=True)[:40])
        name = function.__name__
        renamed = source.replace(name, f"{name}_again").splitlines(keepends=True)
        yield f"{source}\n\n# The same function under another name:\n{''.join(renamed[:2])}"
