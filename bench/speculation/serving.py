"""Serving the same requests with and without speculation, in turns, on one engine: a request says which it wants."""

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

_FEW = 8  # requests at once
_ROUNDS = 4  # requests for each place
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
    """What came of serving some requests: tokens, seconds, and what the scheduler counted meanwhile.

    Attributes:
        step_seconds: mean of what the target took for a step without prompts; None if there was none.
        accepted: how many of the first, second, ... tokens of proposals were.
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
        """Steps of single requests that chose tokens."""
        return self.tokens - sum(self.accepted)


@dataclass(frozen=True)
class Gain:
    """Medians over pairs of runs with and without; sums over those with.

    Attributes:
        off_speed: tokens/s without.
        speed_up: ratio of tokens/s.
        verification: what a step of the target took, relative to one without; v(k) if there always was a proposal;
            None if requests came and went in every step.
        acceptance_rate: accepted / drafted.
        token_acceptance: the chance of a drafted token to be accepted if all before it were.
        share_of_steps: of the steps of requests, those with a proposal.
        mean_spec_tokens: drafted tokens for each step of a request.
        mean_acceptance_length: tokens for each step of a request.
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
        """Of (without, with) pairs."""
        on = [pair[1] for pair in pairs]
        drafted, steps = sum(one.drafted for one in on), sum(one.steps for one in on)
        per_place = [sum(counts) for counts in zip_longest(*(one.accepted for one in on), fillvalue=0)]
        accepted = sum(per_place)
        verifications = [
            other.step_seconds / off.step_seconds for off, other in pairs if other.step_seconds and off.step_seconds
        ]
        tried = sum(one.drafts for one in on) + sum(
            per_place[:-1]
        )  # each place is judged where the one before was good
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
    """A closed loop: so many requests at once, each followed by another when it ends, again and again.

    Args:
        engine: with its target.
        prompts: token ids, dealt to the requests in turns.
        max_tokens: of the longest request; the shortest has half as many, so that they do not end all at once.
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
        """Serve the same requests with and without, in turns; few at once are quick, and served more often.

        Args:
            repeats: pairs of runs with eight or more requests at once.
        """
        self._serve(0, speculates=True)  # the prompts are in the cache then, and the adaptive rule knows the machine
        return Gain.of([self._pair(number) for number in range(repeats * max(1, _FEW // self._concurrency))])

    def _pair(self, number: int) -> tuple[Outcome, Outcome]:
        """Without and with, in either order, so that neither always comes second; other prompts in each pair."""
        order = (True, False) if number % 2 else (False, True)
        outcomes = {speculates: self._serve(number, speculates=speculates) for speculates in order}
        return outcomes[False], outcomes[True]

    def _serve(self, first: int, *, speculates: bool) -> Outcome:
        """Tokens and seconds while all places are taken."""
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
        """Take the places that are free."""
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
    """Functions to go on from; or, for proposers that look things up, functions to be written again with a change."""
    return [tokenizer.encode(text) for text in (_edits() if repeats_itself else _beginnings())]


def _beginnings() -> Iterator[str]:
    for function in _FUNCTIONS:
        lines = inspect.getsource(function).splitlines(keepends=True)
        yield "".join(lines[: max(2, len(lines) // 3)])


def _edits() -> Iterator[str]:
    """A function, and the beginning of the same: under another name, or as it is, to be quoted and gone on from."""
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
