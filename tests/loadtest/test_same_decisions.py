"""With scripted step times the digital twin and the server's engine loop take the same decisions, to the last block."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace as replace_limits
from math import ceil, inf

import pytest
from msgspec.structs import replace

from shoal.loadtest.arrivals import closed_sessions, open_arrivals
from shoal.loadtest.records import Load
from shoal.loadtest.twin import Simulation, played_engines
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.output import SamplingParams, SchedulerOutput, SchedulingParams, StepResult
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.scheduler import Scheduler
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Command, EngineRequest, News, Report, Submit
from tests.fakes import named_policy
from tests.loadtest.twin import LIMITS, SECONDS, ask

STOP = -1
# Few rows and few blocks, so that there is something to decide.
TIGHT = replace_limits(LIMITS, num_blocks=24, max_num_seqs=5, max_num_batched_tokens=48, max_chunk_tokens=32)
KNOBS = {"ageing_seconds": 0.5, "ageing_tokens": 40, "static_timeout_seconds": 0.0305, "fair_lead": 20}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class ScriptedExecutor:
    """Takes the times of a script, step by step, and notes what it was asked for."""

    def __init__(self, workload: list[WorkloadRequest], wait: Callable[[float], None], seed: int) -> None:
        self.workload = {request.request_id: request for request in workload}
        self.wait = wait
        self.script = random.Random(seed)
        self.asked: list[SchedulerOutput] = []

    def execute(self, output: SchedulerOutput) -> StepResult:
        self.asked.append(output)
        num_tokens = sum(share.num_scheduled_tokens for share in output.scheduled)
        if num_tokens:
            self.wait(self.script.uniform(0.002, 0.02) + num_tokens * 0.0005)
        token_ids = []
        for share in output.scheduled:
            request = self.workload[share.request_id]
            place = share.num_computed_tokens + share.num_scheduled_tokens - len(request.prompt_token_ids)
            is_last = place + 1 == request.num_output_tokens
            text = random.Random(f"{share.request_id} {place}").randrange(2**31)
            token_ids.append([STOP if is_last else text] if share.samples else [])
        return StepResult(token_ids)


class Server:
    """Implements `Wire`: the sockets of an engine, with users at the other end who need no time for anything.

    Args:
        load: an open loop, or a closed one without time to think.
    """

    def __init__(self, workload: list[WorkloadRequest], load: Load, clock: Clock) -> None:
        self.clock = clock
        self.num_unfinished = len(workload)
        self.to_come: deque[tuple[float, EngineRequest]] = deque()
        self.sessions: deque[deque[WorkloadRequest]] = deque()
        self.session_of: dict[str, deque[WorkloadRequest]] = {}
        if load.rate:
            for time, request in open_arrivals(load, workload):
                self.submit(request, time)
        else:
            sessions = closed_sessions(load, workload)
            self.sessions.extend(deque(arrival.request for arrival in session) for session in sessions)
            for _ in range(load.users):
                self.go_on(deque())

    def submit(self, asked: WorkloadRequest, time: float) -> None:
        params = SamplingParams(
            max_tokens=asked.max_tokens, min_tokens=asked.max_tokens, seed=0, stop_token_ids=frozenset({STOP})
        )
        scheduling = SchedulingParams(client=asked.client, priority=asked.priority)
        request = EngineRequest(asked.request_id, asked.prompt_token_ids, params, scheduling=scheduling)
        self.to_come.append((time, request))

    def go_on(self, session: deque[WorkloadRequest]) -> None:
        """A user sends its next request."""
        if not session and self.sessions:
            session = self.sessions.popleft()
        if session:
            request = session.popleft()
            self.session_of[request.request_id] = session
            self.submit(request, self.clock.now)

    def send(self, report: Report) -> None:
        assert isinstance(report, News)
        for output in report.outputs:
            if output.finish_reason:
                self.num_unfinished -= 1
                if output.request_id in self.session_of:
                    self.go_on(self.session_of[output.request_id])

    def receive(self, seconds: float | None) -> list[Command]:
        """As the real one: it waits for whole milliseconds."""
        until = inf if seconds is None else self.clock.now + ceil(seconds * 1000) / 1000
        if self.to_come:
            until = min(until, max(self.to_come[0][0], self.clock.now))
        assert until < inf, "the loop would wait for ever"
        self.clock.now = until
        come: list[Command] = []
        while self.to_come and self.to_come[0][0] <= until:
            time, request = self.to_come.popleft()
            come.append(Submit([replace(request, age=until - time)]))
        return come


def crowd(seed: int, num_requests: int = 60) -> list[WorkloadRequest]:
    """Requests of several clients, in sessions whose prompts grow."""
    rng = random.Random(seed)
    workload: list[WorkloadRequest] = []
    while len(workload) < num_requests:
        prompt: list[int] = []
        session = f"s{len(workload)}"
        for _ in range(rng.choice([1, 1, 3])):
            prompt = prompt + [rng.randrange(1000) for _ in range(rng.randint(1, 40))]
            request = ask(
                f"r{len(workload)}",
                num_output_tokens=rng.choice([1, 3, 10, 40]),
                session=session,
                client=rng.choice("ab"),
                priority=rng.randrange(3),
            )
            workload.append(replace(request, prompt_token_ids=prompt))
    return workload


def decisions_of_server(
    workload: list[WorkloadRequest], load: Load, policy: str, limits: SchedulerConfig
) -> list[SchedulerOutput]:
    clock = Clock()

    def wait(seconds: float) -> None:
        clock.now += seconds

    executor = ScriptedExecutor(workload, wait, seed=7)
    core = EngineCore(Scheduler(limits, named_policy(policy, limits, KNOBS)), executor, clock)
    server = Server(workload, load, clock)
    loop = EngineLoop(core, server)
    while server.num_unfinished:
        loop.turn()
    return executor.asked


def decisions_of_twin(
    workload: list[WorkloadRequest], load: Load, policy: str, limits: SchedulerConfig
) -> list[SchedulerOutput]:
    made = named_policy(policy, limits, KNOBS)
    simulation = Simulation(workload, load, played_engines(lambda: made, SECONDS), 0.0)
    engine = simulation.replicas[0]

    def wait(seconds: float) -> None:
        engine.now += seconds

    executor = ScriptedExecutor(workload, wait, seed=7)
    engine.core.executor = executor
    simulation.run()
    return executor.asked


@pytest.mark.parametrize("load", [Load(users=8), Load(rate=40.0, burstiness=4.0), Load(rate=5.0)], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_twin_and_server_take_the_same_decisions(policy: str, load: Load) -> None:
    workload = crowd(seed=5)
    ours, theirs = (decide(workload, load, policy, TIGHT) for decide in (decisions_of_twin, decisions_of_server))
    assert len(ours) > 150
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        assert mine == other, f"step {index}"
    assert len(ours) == len(theirs)
