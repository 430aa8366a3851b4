"""The digital twin: the server's own scheduler and policies in virtual time, with a cost model for all that takes time.

What stands here is the way of requests and tokens around the engine: users, the API process that takes one thing after
the other, and the engine's loop, turn by turn as in `server/engine/process.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from math import ceil, inf
from typing import Any

from shoal.loadtest.arrivals import check_load
from shoal.loadtest.costs import CostModel
from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.records import Load, RequestRecord, Run, Setup
from shoal.loadtest.simulated_engine import STOP_TOKEN_ID, SimulatedExecutor, StepLog, VirtualClock
from shoal.loadtest.simulated_users import ClosedLoop, OpenLoop, Sending, Users
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.output import RequestOutput, SamplingParams, SchedulingParams
from shoal.scheduler.policies import Policy, create_policy, select_knobs
from shoal.scheduler.policies.predictor import Oracle
from shoal.scheduler.policies.sjf import ShortestJobFirst
from shoal.scheduler.request import Request
from shoal.scheduler.scheduler import Scheduler

SJF_ORACLE = "sjf-oracle"
"""The policy `sjf` that was told all lengths; there is none such outside of simulations."""


def simulate(
    workload: Sequence[WorkloadRequest],
    load: Load,
    setup: Setup,
    *,
    limits: SchedulerConfig,
    knobs: dict[str, Any],
    costs: CostModel,
    name: str = "",
    repetition: int = 0,
) -> Run:
    """What a run of this workload would be like, all figures included.

    Args:
        limits, knobs: as the server would have them with the setup's options; of the setup itself only the policy
            counts, which may be `SJF_ORACLE` too.
        name: of the workload.
        repetition: other deviations from the costs, like another measurement.

    Raises:
        ConfigError: there is no such policy.
        LoadTestError: the load is out of range, or the setup speculates, of which the twin knows nothing.
    """
    check_load(load, workload)
    if setup.speculation != "off":
        raise LoadTestError(f"speculation {setup.speculation!r} cannot be simulated: nobody knows what is accepted")
    policy = _make_policy(setup.policy, workload, limits, knobs)
    simulation = Simulation(workload, load, policy=policy, limits=limits, costs=costs, seed=repetition)
    simulation.run()
    return Run(
        setup=setup,
        workload=name,
        load=load,
        repetition=repetition,
        requests=sorted(simulation.records.values(), key=lambda record: record.sent_at),
        steps=simulation.log.steps,
        engine_requests=simulation.log.requests,
        block_size=limits.block_size,
    )


def _make_policy(
    name: str, workload: Sequence[WorkloadRequest], limits: SchedulerConfig, knobs: dict[str, Any]
) -> Policy:
    if name != SJF_ORACLE:
        return create_policy(name, limits, select_knobs(name, knobs))
    lengths = {request.request_id: request.num_output_tokens for request in workload}
    return ShortestJobFirst(limits, ShortestJobFirst.Knobs(ageing_tokens=knobs["ageing_tokens"]), Oracle(lengths))


class Simulation:
    """One run in virtual time.

    Attributes:
        core: the engine, as the server has it.
        log: of its steps.
        records: of the requests, by id.
    """

    def __init__(
        self,
        workload: Sequence[WorkloadRequest],
        load: Load,
        *,
        policy: Policy,
        limits: SchedulerConfig,
        costs: CostModel,
        seed: int = 0,
    ) -> None:
        self.clock = VirtualClock()
        self.log = StepLog()
        self.records: dict[str, RequestRecord] = {}
        self._costs = costs.steps
        self._latencies = costs.latencies
        self._scheduler = Scheduler(limits, policy)
        requests = {request.request_id: request for request in workload}
        self._executor = SimulatedExecutor(requests, costs, self._scheduler, self.clock, seed)
        self.core = EngineCore(self._scheduler, self._executor, self.clock, self.log.observe)
        self._users: Users = (
            ClosedLoop(workload, load, costs.latencies.turnaround) if load.users else OpenLoop(workload, load)
        )
        self._lateness = 0.0 if load.users else costs.latencies.lateness
        self._api_free_at = 0.0
        self._sendings: list[tuple[float, int, WorkloadRequest]] = []  # a heap: what users will have sent when
        self._order = count()
        self._commands: deque[tuple[float, Request]] = deque()  # requests on their way to the engine, and until when

    def run(self) -> None:
        """Until everything is answered."""
        for sending in self._users.begin():
            self._send(sending)
        while self._sendings or self._commands or self._scheduler.num_unfinished:
            self._turn()
        self._scheduler.check_invariants()

    def _turn(self) -> None:
        """`EngineLoop.turn`: wait for something to do, take the commands that have come, run one step, report."""
        for request in self._receive(self._scheduler.wake_time(self.clock.now)):
            self.clock.now += self._costs.arrival_gap_seconds
            try:
                self._scheduler.add(request)
            except ShoalError as error:
                self._refuse(request.request_id, error.message)
        before = len(self.log.steps)
        news = self.core.step()
        if len(self.log.steps) > before:
            self._deliver(news)
            self.clock.now += self._costs.gap(self._executor.shape)

    # -- the engine's socket ---------------------------------------------------------------------------------------

    def _receive(self, wake_time: float | None) -> list[Request]:
        """All requests that have come to the engine; waits until `wake_time` for the first, or for ever (None)."""
        now = self.clock.now
        # Sockets wait for whole milliseconds.
        until = inf if wake_time is None else now + ceil((wake_time - now) * 1000) / 1000
        self._take_sent(now)
        while not self._commands and self._sendings and self._sendings[0][0] <= until:
            self._take_next()
        if self._commands:
            until = min(until, self._commands[0][0])
        self.clock.now = max(now, until)
        self._take_sent(self.clock.now)
        come: list[Request] = []
        while self._commands and self._commands[0][0] <= self.clock.now:
            come.append(self._commands.popleft()[1])
        return come

    # -- the API process -------------------------------------------------------------------------------------------

    def _take_sent(self, until: float) -> None:
        """Let the API process take all requests that reach it until then."""
        while self._sendings and self._sendings[0][0] <= until:
            self._take_next()

    def _take_next(self) -> None:
        """Let the API process take the next request and pass it on."""
        came_at, _, asked = heappop(self._sendings)
        work = self._latencies.request + self._latencies.prompt_token * len(asked.prompt_token_ids)
        self._api_free_at = max(came_at, self._api_free_at) + work
        self._commands.append((self._api_free_at + self._latencies.command, _to_engine(asked, self._api_free_at)))

    def _deliver(self, news: Sequence[RequestOutput]) -> None:
        """Let the API process pass on what came of the step that has just ended, token by token."""
        self._take_sent(self.clock.now)
        free_at = max(self._api_free_at, self.clock.now)
        for output in news:
            free_at += self._latencies.token
            seen_at = free_at + self._latencies.delivery
            record = self.records[output.request_id]
            record.token_times.append(seen_at)
            record.num_output_tokens += len(output.token_ids)
            record.num_cached_tokens += output.num_cached_tokens
            if output.finish_reason:
                self._end(record, seen_at + self._latencies.end)
        self._api_free_at = free_at

    # -- users -----------------------------------------------------------------------------------------------------

    def _send(self, sending: Sending) -> None:
        """Somebody sends a request, now or later."""
        sent_at, request = sending
        self.records[request.request_id] = RequestRecord(
            request_id=request.request_id,
            client=request.client,
            server_id=request.request_id,
            priority=request.priority,
            sent_at=sent_at,
            num_prompt_tokens=len(request.prompt_token_ids),
        )
        reaches_at = sent_at + self._lateness + self._latencies.send
        heappush(self._sendings, (reaches_at, next(self._order), request))

    def _refuse(self, request_id: str, message: str) -> None:
        self.records[request_id].error = message
        self._end(self.records[request_id], self.clock.now + self._latencies.end)

    def _end(self, record: RequestRecord, now: float) -> None:
        record.finished_at = now
        if following := self._users.after(record.request_id, now):
            self._send(following)


def _to_engine(asked: WorkloadRequest, arrival_time: float) -> Request:
    """The request as the server would hand it to the engine: the policy can read the length of its output nowhere."""
    return Request(
        asked.request_id,
        asked.prompt_token_ids,
        SamplingParams(
            max_tokens=asked.max_tokens,
            min_tokens=asked.max_tokens,
            temperature=asked.temperature,
            seed=asked.seed,
            stop_token_ids=frozenset({STOP_TOKEN_ID}),
        ),
        arrival_time,
        scheduling=SchedulingParams(
            client=asked.client,
            priority=asked.priority,
            ttft_slo_ms=asked.ttft_slo_ms,
            tpot_slo_ms=asked.tpot_slo_ms,
        ),
    )
