"""Serving the same requests with and without speculation, in turns, on one engine: a request says which it wants."""

from __future__ import annotations

import inspect
import json
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, zip_longest
from statistics import median

from model.tokenizer import Tokenizer
from scheduler.engine import EngineCore
from scheduler.output import SamplingParams, SchedulerStats
from scheduler.request import Request

_FEW = 8  # requests at once
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
        accepted: how many of the first, second, ... tokens of proposals were.
    """

    tokens: int
    seconds: float
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
        acceptance_rate: accepted / drafted.
        token_acceptance: the chance of a drafted token to be accepted if all before it were.
        mean_spec_tokens: drafted tokens for each step of a request.
        mean_acceptance_length: tokens for each step of a request.
    """

    off_speed: float
    speed_up: float
    acceptance_rate: float
    token_acceptance: float
    mean_spec_tokens: float
    mean_acceptance_length: float

    @classmethod
    def of(cls, pairs: list[tuple[Outcome, Outcome]]) -> Gain:
        """Of (without, with) pairs."""
        on = [pair[1] for pair in pairs]
        drafted, steps = sum(one.drafted for one in on), sum(one.steps for one in on)
        per_place = [sum(counts) for counts in zip_longest(*(one.accepted for one in on), fillvalue=0)]
        accepted = sum(per_place)
        tried = sum(one.drafts for one in on) + sum(
            per_place[:-1]
        )  # each place is judged where the one before was good
        return cls(
            off_speed=median(off.speed for off, _ in pairs),
            speed_up=median(other.speed / off.speed for off, other in pairs),
            acceptance_rate=accepted / drafted if drafted else 0.0,
            token_acceptance=min(1.0, accepted / tried) if tried else 0.0,
            mean_spec_tokens=drafted / steps,
            mean_acceptance_length=sum(one.tokens for one in on) / steps,
        )


class Load:
    """So many requests at once, again and again.

    Args:
        prompts: token ids, dealt to the requests in turns.
    """

    def __init__(
        self, core: EngineCore, prompts: list[list[int]], concurrency: int, temperature: float, max_tokens: int
    ) -> None:
        self._core, self._prompts = core, prompts
        self._concurrency, self._temperature, self._max_tokens = concurrency, temperature, max_tokens
        self._numbers = count()
        self._first = 0

    def measure(self, repeats: int) -> Gain:
        """Serve the same requests with and without, in turns; few at once are quick, and served more often."""
        for _ in self._prompts:  # they are in the cache then, and the adaptive rule knows the machine
            self._serve(speculates=True)
            self._first += self._concurrency
            if self._first >= len(self._prompts):
                break
        return Gain.of(
            [self._pair(is_first_on=bool(number % 2)) for number in range(repeats * max(1, _FEW // self._concurrency))]
        )

    def _pair(self, *, is_first_on: bool) -> tuple[Outcome, Outcome]:
        """Without and with, in either order, so that neither always comes second; other prompts in each pair."""
        outcomes = {speculates: self._serve(speculates=speculates) for speculates in (is_first_on, not is_first_on)}
        self._first += self._concurrency
        return outcomes[False], outcomes[True]

    def _serve(self, *, speculates: bool) -> Outcome:
        """Tokens and seconds from the moment on that all requests have their first token."""
        scheduler = self._core.scheduler
        for index in range(self._concurrency):
            prompt = self._prompts[(self._first + index) % len(self._prompts)]
            params = SamplingParams(max_tokens=self._max_tokens, temperature=self._temperature, seed=index)
            request_id = f"{next(self._numbers)}"
            scheduler.add(Request(request_id, prompt, params, time.monotonic(), speculates=speculates))
        waiting = set(scheduler.waiting)
        while waiting:
            waiting -= {output.request_id for output in self._core.step()}
        before, tokens, began = scheduler.stats(), 0, time.perf_counter()
        while scheduler.num_unfinished:
            tokens += sum(len(output.token_ids) for output in self._core.step())
        return _outcome(tokens, time.perf_counter() - began, before, scheduler.stats())


def _outcome(tokens: int, seconds: float, before: SchedulerStats, after: SchedulerStats) -> Outcome:
    places = zip_longest(after.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, fillvalue=0)
    accepted = tuple(now - then for now, then in places)
    drafted = after.num_draft_tokens - before.num_draft_tokens
    return Outcome(tokens, seconds, after.num_drafts - before.num_drafts, drafted, accepted)


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
