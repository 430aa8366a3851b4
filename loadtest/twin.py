"""The digital twin: the server's own scheduler and policies in virtual time, with a cost model for all that takes time.

This module plays what is around the scheduler: users, the API process, and the engine's loop, turn by turn as in
`server/engine/process.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain, islice
from math import ceil, inf
from random import Random
from zlib import crc32

from msgspec.structs import asdict

from shoal.loadtest.arrivals import Arrival, closed_sessions, open_arrivals
from shoal.loadtest.costs import CostModel, StepShape
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, RequestRecord, Run, ServerInfo
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler import output
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.policies import Policy, find_policy
from shoal.scheduler.policies.predictor import Oracle
from shoal.scheduler.policies.sjf import ShortestJobFirst
from shoal.scheduler.request import Request
from shoal.scheduler.scheduler import Scheduler
from shoal.scheduler.step_record import StepRecord

SJF_ORACLE = "sjf-oracle"  # the policy `sjf` with all lengths known; it exists in simulations only
_STOP = -1  # a token that is in no prompt, whatever the vocabulary


def simulate(planned: PlannedRun, requests: Sequence[WorkloadRequest], *, server: ServerInfo, costs: CostModel) -> Run:
    """What a run would be like, all figures included.

    Args:
        planned: its policy may be `SJF_ORACLE`; its repetition is the seed of the deviations from the costs, so that
            another repetition is like another measurement.
        server: limits and the knobs of the policy are taken from it.

    Raises:
        ConfigError: there is no such policy, or a knob is out of range.
        LoadTestError: requests have no arrival times, or the setup speculates, which the twin cannot simulate.
    """
    setup, limits, knobs = planned.setup, server.limits, server.settings["scheduler"]
    if setup.speculation != "off":
        raise LoadTestError(f"speculation {setup.speculation!r} cannot be simulated: nobody knows what is accepted")
    if setup.policy == SJF_ORACLE:
        lengths = {request.request_id: request.num_output_tokens for request in requests}
        policy: Policy = ShortestJobFirst(limits, ShortestJobFirst.Knobs.select(knobs), Oracle(lengths))
    else:
        kind = find_policy(setup.policy)
        policy = kind(limits, kind.Knobs.select(knobs))
    simulation = Simulation(requests, planned.load, policy=policy, costs=costs, seed=planned.repetition)
    simulation.run()
    records = sorted(simulation.records.values(), key=lambda record: record.sent_at)
    steps = [step for step in simulation.steps if step.shares]
    return Run(**asdict(planned), server=server, requests=records, steps=steps)


class Simulation:
    """One run in virtual time, which is also the `scheduler.engine.Executor` of its engine.

    Args:
        seed: of the deviations from what the costs predict.

    Attributes:
        now: the virtual clock, in seconds after the start.  It may be set, but never back.
        core: the engine, as the server has it.
        steps: the records of its steps.
        records: the requests, by id.
    """

    def __init__(
        self, requests: Sequence[WorkloadRequest], load: Load, *, policy: Policy, costs: CostModel, seed: int = 0
    ) -> None:
        self.now = 0.0
        self.steps: list[StepRecord] = []
        self.records: dict[str, RequestRecord] = {}
        self._requests = {request.request_id: request for request in requests}
        self._costs = costs
        self._random = Random(seed)
        self._scheduler = Scheduler(policy.config, policy)
        self.core = EngineCore(self._scheduler, self, lambda: self.now, [self.steps.append])
        self._sent: list[tuple[float, int, WorkloadRequest]] = []  # a heap: when each request reaches the engine
        self._users: dict[str, Iterator[Arrival]] = {}  # what its user sends next, by the request in flight
        if load.users:
            sessions = iter(closed_sessions(load, requests))
            for _ in range(load.users):
                user = chain.from_iterable(sessions)  # takes the next session when its last is over
                for _, request in islice(user, 1):
                    self._send(0.0, request, user)
        else:
            for due_at, request in open_arrivals(load, requests):
                self._send(due_at, request, iter(()))

    def run(self) -> None:
        """Simulate until all requests are answered."""
        while self._sent or self._scheduler.num_unfinished:
            self._turn()
        check_invariants(self._scheduler)

    def _turn(self) -> None:
        """`EngineLoop.turn`: wait for something to do, take the commands that have come, run one step, report."""
        for asked in self._receive(self._scheduler.wake_time(self.now)):
            try:
                self._scheduler.add(_to_engine(asked, self.now))
            except ShoalError as error:
                self.records[asked.request_id].error = error.message
                self._end(self.records[asked.request_id], self.now)
        self._deliver(self.core.step())

    # -- the engine ------------------------------------------------------------------------------------------------

    def execute(self, step: output.SchedulerOutput) -> output.StepResult:
        """Let the clock jump by what the step costs, and choose tokens that no other text has."""
        shape = StepShape.of(step.scheduled)
        self.now += self._costs.seconds(shape) * self._random.choice(self._costs.ratios(shape.num_streams))
        return output.StepResult([[self._choose(share)] if share.samples else [] for share in step.scheduled])

    def _choose(self, share: output.ScheduledRequest) -> int:
        """The token after the share's last, or the stop token where the text ends."""
        request = self._requests[share.request_id]
        place = share.num_computed_tokens + share.num_scheduled_tokens - len(request.prompt_token_ids)
        is_last = place + 1 >= request.num_output_tokens
        return _STOP if is_last else output_token(share.request_id, place)

    def _receive(self, wake_time: float | None) -> list[WorkloadRequest]:
        """All requests that have come to the engine; waits for the first until `wake_time`, or without end (None)."""
        # Sockets wait for whole milliseconds.
        until = inf if wake_time is None else self.now + ceil((wake_time - self.now) * 1000) / 1000
        if self._sent:
            until = min(until, self._sent[0][0])
        self.now = max(self.now, until)
        come: list[WorkloadRequest] = []
        while self._sent and self._sent[0][0] <= self.now:
            come.append(heappop(self._sent)[2])
        return come

    # -- the API process -------------------------------------------------------------------------------------------

    def _deliver(self, news: Sequence[output.RequestOutput]) -> None:
        """Pass on the tokens of the step that has just ended."""
        seen_at = self.now + self._costs.delivery_seconds
        for one in news:
            record = self.records[one.request_id]
            record.token_times.append(seen_at)
            record.num_output_tokens += len(one.token_ids)
            record.num_cached_tokens += one.num_cached_tokens
            if one.finish_reason:
                self._end(record, seen_at)

    # -- users -----------------------------------------------------------------------------------------------------

    def _send(self, sent_at: float, request: WorkloadRequest, user: Iterator[Arrival]) -> None:
        """A user sends a request, now or later; `user` is what the same user sends afterwards."""
        record = self.records[request.request_id] = request.record(sent_at)
        record.engine_id, record.num_prompt_tokens = request.request_id, len(request.prompt_token_ids)
        self._users[request.request_id] = user
        heappush(self._sent, (sent_at + self._costs.send_seconds, len(self.records), request))

    def _end(self, record: RequestRecord, now: float) -> None:
        """An answer ends, and its user goes on."""
        record.finished_at = now
        user = self._users.pop(record.request_id)
        for pause, request in islice(user, 1):
            self._send(now + pause, request, user)


def output_token(request_id: str, place: int) -> int:
    """The token that a request's text has in this place, unless it ends there."""
    return crc32(f"{request_id} {place}".encode()) >> 1


def _to_engine(asked: WorkloadRequest, arrival_time: float) -> Request:
    """The request as the server hands it to the engine.  It does not tell the length of its output."""
    limit, stop = asked.max_tokens, frozenset({_STOP})
    params = output.SamplingParams(
        max_tokens=limit, min_tokens=limit, temperature=asked.temperature, seed=asked.seed, stop_token_ids=stop
    )
    scheduling = output.SchedulingParams(
        client=asked.client, priority=asked.priority, ttft_slo_ms=asked.ttft_slo_ms, tpot_slo_ms=asked.tpot_slo_ms
    )
    return Request(asked.request_id, asked.prompt_token_ids, params, arrival_time, scheduling=scheduling)
