"""One engine of the digital twin: the server's scheduler and policy, and a clock that jumps by what steps cost."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from math import ceil
from operator import sub
from typing import Any, NamedTuple, Protocol
from zlib import crc32

from shoal.loadtest.costs import NOT_CROWDED, CostModel, Durations, StepShape
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler import output
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.leap import LeapingScheduler
from shoal.scheduler.policies import Policy
from shoal.scheduler.request import Request
from shoal.scheduler.step_record import StepRecord

STOP = -1  # a token that is in no prompt, whatever the vocabulary
_MOST_LEAPT = 64  # steps; a request that comes in between has the others planned anew


class Delivery(NamedTuple):
    """Tokens of a request that an engine has chosen.

    Attributes:
        seen_at: when its user sees the last of them.
        num_cached_tokens: of the prompt, told with the first token.
        is_last: whether the request has ended.
    """

    request_id: str
    seen_at: float
    num_tokens: int
    num_cached_tokens: int = 0
    is_last: bool = False


class TwinEngine(Protocol):
    """An engine in virtual time.

    `begin` starts a step, or some plain ones at once, and says when they are over; then `end` tells what came of them.
    A request that comes meanwhile waits in the inbox, and `interrupt` ends plain steps after the one that is under way.

    Attributes:
        requests: all unfinished requests, by id.
        inbox: of them, those that the scheduler has not seen yet.
        version: grows with each plan of what the engine does next.
    """

    config: SchedulerConfig
    requests: dict[str, WorkloadRequest]
    inbox: list[Any]
    version: int
    is_busy: bool

    def put(self, asked: WorkloadRequest, hashes: list[bytes], now: float, num_delivered: int) -> None:
        """A request comes into the inbox.

        Args:
            hashes: of the full blocks of its prompt.
            num_delivered: output tokens that another engine has delivered before it was lost.
        """
        ...

    def take(self) -> list[tuple[str, ShoalError]]:
        """Have the scheduler take what is in the inbox; returns the ids of those that it refuses, and why."""
        ...

    def wake_time(self, now: float) -> float | None:
        """When there is something to compute if no request comes; None if there is nothing."""
        ...

    def begin(self, now: float, num_busy: int) -> float:
        """Begin to compute; returns when that is over.

        Args:
            num_busy: engines that compute on the machine, this one included.
        """
        ...

    def interrupt(self, now: float) -> float | None:
        """Leave out the plain steps that would begin after `now`; returns when the others are over, if any is left out.

        A step that ends at `now` is the last.
        """
        ...

    def end(self) -> list[Delivery]:
        """What came of what was begun."""
        ...

    def break_off(self, now: float) -> list[Delivery]:
        """What came of it until the engine died.  Of a step that was under way nothing comes."""
        ...

    def queue_seconds(self, now: float) -> float:
        """For how long the oldest waiting request has waited."""
        ...

    @property
    def kv_cache_usage(self) -> float:
        """The share of the blocks that requests own."""
        ...


class Replica:
    """A `TwinEngine` that plays each step, which is also the `scheduler.engine.Executor` of its core.

    Args:
        durations: of steps, by the costs.
        first_step: number of the engine's first step.
        records_steps: whether each step is recorded; otherwise plain ones are leapt over, with the same outcome, and
            users see the tokens of a leap when they see the last of them.

    Attributes:
        now: the virtual clock of the engine, in seconds.  It may be set, but never back.
        steps: the records of its steps.
    """

    def __init__(
        self, policy: Policy, costs: CostModel, durations: Durations, first_step: int = 0, *, records_steps: bool = True
    ) -> None:
        self.config = policy.config
        self.now = 0.0
        self.steps: list[StepRecord] = []
        self.requests: dict[str, WorkloadRequest] = {}
        self.inbox: list[Request] = []
        self.version = 0
        self.is_busy = False
        self.scheduler = LeapingScheduler(policy.config, policy)
        self.core = EngineCore(self.scheduler, self, lambda: self.now, [self.steps.append] if records_steps else [])
        self._costs, self._durations, self._number = costs, durations, first_step
        self._crowding = NOT_CROWDED  # what other engines on the machine make of a step
        self._began = 0.0
        self._leapt: list[float] = []  # ends of the plain steps that are under way
        self._news: list[output.RequestOutput] = []

    def put(self, asked: WorkloadRequest, hashes: list[bytes], now: float, num_delivered: int) -> None:
        self.requests[asked.request_id] = asked
        request = to_engine(asked, now, num_delivered)
        request.block_hashes = hashes
        self.inbox.append(request)

    def take(self) -> list[tuple[str, ShoalError]]:
        refused: list[tuple[str, ShoalError]] = []
        for request in self.inbox:
            try:
                self.scheduler.add(request)
            except ShoalError as error:
                refused.append((request.request_id, error))
                del self.requests[request.request_id]
        self.inbox.clear()
        return refused

    def wake_time(self, now: float) -> float | None:
        found = self.scheduler.wake_time(now)
        # Sockets wait for whole milliseconds.
        return None if found is None else now + ceil((found - now) * 1000) / 1000

    def begin(self, now: float, num_busy: int) -> float:
        self._began = self.now = now
        self._crowding = self._costs.crowded(num_busy)
        self.is_busy = True
        # What others make of a step may change with each one.
        is_played = self.core.observers or self._costs.crowding
        if not is_played and (most := min(self.scheduler.num_plain_steps, _MOST_LEAPT)):
            self._leapt = self._plain_steps(most)
            return self._leapt[-1]
        self._news = self.core.step()
        return self.now

    def interrupt(self, now: float) -> float | None:
        count = bisect_left(self._leapt, now) + 1
        if count >= len(self._leapt):
            return None
        del self._leapt[count:]
        return self._leapt[-1]

    def end(self) -> list[Delivery]:
        self.is_busy = False
        if self._leapt:
            return self._leap()
        seen_at = self._seen(self.now)
        news, self._news = self._news, []
        return [Delivery(one.request_id, seen_at, 1, one.num_cached_tokens, bool(one.finish_reason)) for one in news]

    def break_off(self, now: float) -> list[Delivery]:
        ends = self._leapt[: bisect_right(self._leapt, now)]
        return [Delivery(name, self._seen(ends[-1]), len(ends)) for name in self.scheduler.running] if ends else []

    # -- what is seen of it ----------------------------------------------------------------------------------------

    def queue_seconds(self, now: float) -> float:
        return max((now - request.arrival_time for request in self.scheduler.waiting.values()), default=0.0)

    @property
    def kv_cache_usage(self) -> float:
        return self.scheduler.kv_cache.pool.num_owned / self.config.num_blocks

    # -- the executor ----------------------------------------------------------------------------------------------

    def execute(self, step: output.SchedulerOutput) -> output.StepResult:
        """Let the clock jump by what the step costs, and choose tokens that no other text has."""
        shape = StepShape.of(step.scheduled)
        if shape.num_tokens:
            self.now += self._durations.one(shape, self._number, self._crowding)
            self._number += 1
        return output.StepResult([[self._choose(share)] if share.samples else [] for share in step.scheduled])

    def _choose(self, share: output.ScheduledRequest) -> int:
        """The token after the share's last, or the stop token where the text ends."""
        asked = self.requests.get(share.request_id)
        if asked is None:
            return STOP  # of a padding row, and for nobody
        place = share.num_computed_tokens + share.num_scheduled_tokens - len(asked.prompt_token_ids)
        return STOP if place + 1 >= asked.num_output_tokens else output_token(share.request_id, place)

    # -- leaps -----------------------------------------------------------------------------------------------------

    def _plain_steps(self, most: int) -> list[float]:
        """When the plain steps end that follow, `most` of them or as many as come until a request ends."""
        running = self.scheduler.running.values()
        left = min(self.requests[one.request_id].num_output_tokens - one.num_output_tokens for one in running)
        num_keys = sum(one.num_tokens for one in running)
        seconds = self._durations.plain(len(running), num_keys, self._number, min(left, most))
        seconds[0] += self.now
        ends: list[float] = seconds.cumsum().tolist()
        return ends

    def _leap(self) -> list[Delivery]:
        ends, self._leapt = self._leapt, []
        self.now = ends[-1]
        self._number += len(ends)
        names = list(self.scheduler.running)
        seconds = map(sub, ends, chain([self._began], ends))
        ended = {one.request_id for one in self.scheduler.leap(len(ends), seconds, self._choose_several)}
        return [Delivery(name, self._seen(ends[-1]), len(ends), 0, name in ended) for name in names]

    def _seen(self, end: float) -> float:
        """When users see the tokens of a step that ended then."""
        return end + self._costs.delivery_seconds

    def _choose_several(self, request: Request, count: int) -> Sequence[int]:
        place = request.num_output_tokens
        first = output_token(request.request_id, place)
        if place + count < self.requests[request.request_id].num_output_tokens:
            return range(first, first + count)
        return [*range(first, first + count - 1), STOP]


def output_token(request_id: str, place: int) -> int:
    """The token that a request's text has in this place, unless it ends there."""
    return (crc32(request_id.encode()) >> 2) + place


def to_engine(asked: WorkloadRequest, arrival_time: float, num_delivered: int = 0) -> Request:
    """The request as the server hands it to the engine.  It does not tell the length of its output.

    Args:
        num_delivered: output tokens that another engine has delivered before it was lost.
    """
    delivered = range(first := output_token(asked.request_id, 0), first + num_delivered)
    params = _params(asked.max_tokens)
    scheduling = _scheduling(asked.client, asked.priority, asked.ttft_slo_ms, asked.tpot_slo_ms)
    return Request(asked.request_id, asked.prompt_token_ids, params, arrival_time, delivered, scheduling=scheduling)


@lru_cache
def _params(max_tokens: int) -> output.SamplingParams:
    """What the scheduler may know of how tokens are chosen."""
    return output.SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, seed=0, stop_token_ids=frozenset({STOP}))


@lru_cache
def _scheduling(client: str, priority: int, ttft: float | None, tpot: float | None) -> output.SchedulingParams:
    return output.SchedulingParams(client=client, priority=priority, ttft_slo_ms=ttft, tpot_slo_ms=tpot)
