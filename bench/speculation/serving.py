"""Serving the same requests with and without speculation in turns, on one engine."""

from __future__ import annotations

import inspect
import json
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, zip_longest
from statistics import fmean, median

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


@dataclass(frozen=True)
class Outcome:
    """The result of serving some requests: tokens, seconds, and counts of the scheduler.

    Attributes:
        step_seconds: mean time of the target's steps without prompts; None if there were none.
        accepted: number of accepted tokens at the first, second, ... place of proposals.
    """

    tokens: int
    seconds: float
    step_seconds: float | None
    drafts: int
    drafted: int
    accepted: tuple[int, ...]

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    @property
    def steps(self) -> int:
        """Number of steps, counted for each request apart."""
        return self.tokens - sum(self.accepted)


@dataclass(frozen=True)
class Gain:
    """Speed and costs are medians over pairs of runs with and without speculation; the rest is of all runs with it.

    Attributes:
        off_speed: tokens/s without speculation.
        speed_up: ratio of tokens/s, with over without.
        verification: ratio of the times of the target's steps, with over without: v(k) if each step had a proposal;
            None if every step had a prompt in it.
        acceptance_rate: accepted over drafted tokens.
        token_acceptance: chance that a drafted token is accepted if all before it are.
        share_of_steps: share of the steps of requests that had a proposal.
        mean_spec_tokens: drafted tokens in a step of a request.
        mean_acceptance_length: tokens that a step of a request gives.
    """

    off_speed: float
    speed_up: float
    verification: float | None
    acceptance_rate: float
    token_acceptance: float
    share_of_steps: float
    mean_spec_tokens: float
    mean_acceptance_length: float

    @classmethod
    def of(cls, pairs: list[tuple[Outcome, Outcome]]) -> Gain:
        """Summarize pairs of runs (without, with)."""
        on = [pair[1] for pair in pairs]
        drafted, steps = sum(one.drafted for one in on), sum(one.steps for one in on)
        per_place = [sum(counts) for counts in zip_longest(*(one.accepted for one in on), fillvalue=0)]
        accepted = sum(per_place)
        verifications = [
            other.step_seconds / off.step_seconds for off, other in pairs if other.step_seconds and off.step_seconds
        ]
        # A place is verified where the place before was accepted.
        tried = sum(one.drafts for one in on) + sum(per_place[:-1])
        return cls(
            off_speed=median(off.speed for off, _ in pairs),
            speed_up=median(other.speed / off.speed for off, other in pairs),
            verification=median(verifications) if verifications else None,
            acceptance_rate=accepted / drafted if drafted else 0.0,
            token_acceptance=min(1.0, accepted / tried) if tried else 0.0,
            share_of_steps=sum(one.drafts for one in on) / steps,
            mean_spec_tokens=drafted / steps,
            mean_acceptance_length=sum(one.tokens for one in on) / steps,
        )


class Load:
    """A closed loop: when one of `concurrency` requests ends, another one follows.

    Args:
        engine: an engine and its target.
        prompts: token ids; the requests take them in turns.
        max_tokens: length of the longest request; the shortest is half as long, so that they do not end all at once.
    """

    def __init__(
        self,
        engine: tuple[EngineCore, TimedBackend],
        prompts: list[list[int]],
        concurrency: int,
        temperature: float,
        max_tokens: int,
    ) -> None:
        self._core, self._target = engine
        self._prompts = prompts
        self._concurrency, self._temperature, self._max_tokens = concurrency, temperature, max_tokens
        self._numbers = count()

    def measure(self, repeats: int) -> Gain:
        """Serve the same requests with and without speculation, in turns.

        Args:
            repeats: number of pairs of runs with eight or more requests at once; with fewer requests there are more.
        """
        self._serve(0, speculates=True)  # fills the prefix cache, and lets the adaptive length learn
        return Gain.of([self._pair(number) for number in range(repeats * max(1, _FEW // self._concurrency))])

    def _pair(self, number: int) -> tuple[Outcome, Outcome]:
        """Serve without and with speculation, in alternating order, so that neither always comes second."""
        order = (True, False) if number % 2 else (False, True)
        outcomes = {speculates: self._serve(number, speculates=speculates) for speculates in order}
        return outcomes[False], outcomes[True]

    def _serve(self, first: int, *, speculates: bool) -> Outcome:
        """Serve requests, and count while all places are taken."""
        scheduler = self._core.scheduler
        requests = iter([self._request(first + i, speculates) for i in range(_ROUNDS * self._concurrency)])
        self._fill(requests)
        waiting = set(scheduler.waiting)
        while waiting:  # the first of many may end before the last has begun
            waiting -= {output.request_id for output in self._core.step()}
            self._fill(requests)
        before, tokens, began = scheduler.stats(), 0, time.perf_counter()
        steps: list[float] = []
        while scheduler.num_unfinished == self._concurrency:
            tokens += sum(len(output.token_ids) for output in self._core.step())
            if self._target.chooses_all:
                steps.append(self._target.seconds)
            self._fill(requests)
        outcome = _outcome(tokens, time.perf_counter() - began, steps, before, scheduler.stats())
        while scheduler.num_unfinished:
            self._core.step()
        return outcome

    def _fill(self, requests: Iterator[Request]) -> None:
        """Add requests until all places are taken."""
        scheduler = self._core.scheduler
        for request in islice(requests, self._concurrency - scheduler.num_unfinished):
            scheduler.add(request)

    def _request(self, index: int, speculates: bool) -> Request:
        prompt = self._prompts[index % len(self._prompts)]
        num_tokens = self._max_tokens // 2 + index * 5 % 8 * self._max_tokens // 14
        params = SamplingParams(max_tokens=num_tokens, temperature=self._temperature, seed=index)
        return Request(f"{next(self._numbers)}", prompt, params, time.monotonic(), speculates=speculates)


def _outcome(tokens: int, seconds: float, steps: list[float], before: SchedulerStats, after: SchedulerStats) -> Outcome:
    places = zip_longest(after.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, fillvalue=0)
    accepted = tuple(now - then for now, then in places)
    drafted = after.num_draft_tokens - before.num_draft_tokens
    step_seconds = fmean(steps) if steps else None
    return Outcome(tokens, seconds, step_seconds, after.num_drafts - before.num_drafts, drafted, accepted)


def make_prompts(tokenizer: Tokenizer, *, repeats_itself: bool) -> list[list[int]]:
    """Return beginnings of functions, or functions to be written again with a change, for proposers that look up."""
    return [tokenizer.encode(text) for text in (_edits() if repeats_itself else _beginnings())]


def _beginnings() -> Iterator[str]:
    for function in _FUNCTIONS:
        lines = inspect.getsource(function).splitlines(keepends=True)
        yield "".join(lines[: max(2, len(lines) // 3)])


def _edits() -> Iterator[str]:
    """Yield functions, each followed by its beginning, under another name or the same."""
    for index, function in enumerate(_FUNCTIONS):
        lines = inspect.getsource(function).splitlines(keepends=True)[:40]
        name = function.__name__
        if index % 2:
            task, start = "The same again, with a test behind it", lines[:2]
        else:
            task, start = (
                "The same function under another name",
                [line.replace(name, f"{name}_2") for line in lines[:2]],
            )
        yield f"{''.join(lines)}\n\n# {task}:\n{''.join(start)}"
