"""The digital twin: the server's own scheduler and policies in virtual time, with a cost model for all that takes time.

This module plays what is around the engines: users, the API process and its router, turn by turn as in
`server/engine/process.py` and `server/engine/router.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain, count, islice
from typing import Any, Generic, NamedTuple, TypeVar

from msgspec.structs import asdict

from shoal.loadtest.arrivals import Arrival, closed_sessions, open_arrivals
from shoal.loadtest.costs import CostModel, Durations
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, RequestRecord, Run, ServerInfo
from shoal.loadtest.replica import Delivery, Replica, TwinEngine
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.policies import Policy, find_policy
from shoal.scheduler.policies.predictor import Oracle
from shoal.scheduler.policies.sjf import ShortestJobFirst
from shoal.scheduler.prefix_cache import extend_hashes
from shoal.scheduler.routing import PrefixRouting

SJF_ORACLE = "sjf-oracle"  # the policy `sjf` with all lengths known; it exists in simulations only
_ENDS, _COMES, _CHANGES, _BEGINS = range(4)  # of what happens at the same moment, the first first
_STEPS_APART = 1001  # the numbers of the first steps of two engines, so that each deviates in its own way

E = TypeVar("E", bound=TwinEngine)
User = Iterator[Arrival]  # what a user sends next, after the answer to what it has sent


def simulate(planned: PlannedRun, requests: Sequence[WorkloadRequest], *, server: ServerInfo, costs: CostModel) -> Run:
    """What a run would be like, all figures included.

    Args:
        planned: its policy may be `SJF_ORACLE`; its repetition is the seed of the deviations from the costs, so that
            another repetition is like another measurement.
        server: limits, the knobs of the policy, and the number of its engines are taken from it.

    Raises:
        ConfigError: there is no such policy, or a knob is out of range.
        LoadTestError: requests have no arrival times, or the setup speculates, which the twin cannot simulate.
    """
    engine = played_engines(policy_of(planned, requests, server), costs, planned.repetition)
    simulation = Simulation(requests, planned.load, engine, costs.send_seconds, num_replicas=server.num_engines)
    simulation.run()
    records = sorted(simulation.records.values(), key=lambda record: record.sent_at)
    steps, *others = ([step for step in replica.steps if step.shares] for replica in simulation.replicas.values())
    return Run(**asdict(planned), server=server, requests=records, steps=steps, other_steps=others)


def policy_of(planned: PlannedRun, requests: Sequence[WorkloadRequest], server: ServerInfo) -> Callable[[], Policy]:
    """Makes the policy of each engine; raises as `simulate` does."""
    setup, limits, knobs = planned.setup, server.limits, server.settings["scheduler"]
    if setup.speculation != "off":
        raise LoadTestError(f"speculation {setup.speculation!r} cannot be simulated: nobody knows what is accepted")
    if setup.policy == SJF_ORACLE:
        lengths = {request.request_id: request.num_output_tokens for request in requests}
        return lambda: ShortestJobFirst(limits, ShortestJobFirst.Knobs.select(knobs), Oracle(lengths))
    kind = find_policy(setup.policy)
    own = kind.Knobs.select(knobs)
    return lambda: kind(limits, own)


def played_engines(
    policy: Callable[[], Policy], costs: CostModel, seed: int = 0, *, records_steps: bool = True
) -> Callable[[], Replica]:
    """Makes engines whose steps are played, each with deviations of its own; `Replica` says what the arguments are."""
    durations, first_steps = Durations(costs, seed), count(step=_STEPS_APART)
    return lambda: Replica(policy(), costs, durations, next(first_steps), records_steps=records_steps)


class _Flight(NamedTuple):
    """A request that is not answered yet; and the number of the replica that has it, or None if none is there."""

    request: WorkloadRequest
    record: RequestRecord
    user: User
    number: int | None = None


class Simulation(Generic[E]):
    """One run in virtual time, with any number of engines.

    What happens is a heap of events.  An engine has one: the end of what it computes, or the begin of what it computes
    next.  So engines that have nothing to do cost nothing.

    Args:
        engine: makes engines.
        send_seconds: of a request on its way from the user to the engine.
        routing: chooses engines.

    Attributes:
        now: the virtual clock, in seconds after the start.
        replicas: the engines that there are, by number.
        records: the requests that have ended, by id.
    """

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        load: Load,
        engine: Callable[[], E],
        send_seconds: float,
        *,
        num_replicas: int = 1,
        routing: PrefixRouting | None = None,
    ) -> None:
        self.now = 0.0
        self.replicas: dict[int, E] = {}
        self.records: dict[str, RequestRecord] = {}
        self._engine, self._send_seconds = engine, send_seconds
        self._routing = routing or PrefixRouting()
        self._events: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()  # of events that are alike
        self._flights: dict[str, _Flight] = {}
        self._num_busy = 0  # engines that compute
        for number in range(num_replicas):
            self.start(number)
        if load.users:
            sessions = iter(closed_sessions(load, requests))
            for _ in range(load.users):
                user = chain.from_iterable(sessions)  # takes the next session when its last is over
                self._go_on(user, 0.0, thinks=False)
        else:
            self._arrivals = iter(open_arrivals(load, requests))
            self._await_arrival()

    def run(self) -> None:
        """Simulate until all requests are answered."""
        while self._events:
            self.now, _, _, happens, what = heappop(self._events)
            happens(*what)
        assert not self._flights, "requests are unfinished"

    def at(self, time: float, happens: Callable[..., None], *what: Any, rank: int = _CHANGES) -> None:
        """Have something happen."""
        heappush(self._events, (time, rank, next(self._order), happens, what))

    # -- engines come and go ---------------------------------------------------------------------------------------

    def start(self, number: int) -> None:
        """An engine is ready; requests that found none go to it."""
        engine = self.replicas[number] = self._engine()
        self._routing.join(number, engine.config.num_blocks)
        for flight in [flight for flight in self._flights.values() if flight.number is None]:
            self._route(flight)

    def lose(self, number: int) -> None:
        """An engine is gone; its requests go on at others, after what was delivered."""
        replica = self.replicas.pop(number)
        self._routing.leave(number)
        self._num_busy -= replica.is_busy
        for delivery in replica.break_off(self.now):
            self._deliver(number, delivery)
        for request_id in replica.requests:
            self._route(self._flights[request_id])

    # -- engines compute -------------------------------------------------------------------------------------------

    def _plan(self, number: int, replica: E, time: float, happens: Callable[..., None], rank: int) -> None:
        """What an engine does next, in place of what was planned."""
        replica.version += 1
        self.at(time, happens, number, replica, replica.version, rank=rank)

    def _begin(self, number: int, replica: E, version: int) -> None:
        """`EngineLoop.turn`: wait for something to do, take the requests that have come, run one step."""
        if version != replica.version or self.replicas.get(number) is not replica:
            return
        wake_time = replica.wake_time(self.now)
        if not replica.inbox and (wake_time is None or wake_time > self.now):
            if wake_time is not None:
                self._plan(number, replica, wake_time, self._begin, _BEGINS)
            return
        for request_id, error in replica.take():
            self._flights[request_id].record.error = error.message
            self._end(number, request_id, self.now)
        self._num_busy += 1
        self._plan(number, replica, replica.begin(self.now, self._num_busy), self._finish, _ENDS)

    def _finish(self, number: int, replica: E, version: int) -> None:
        """A step has ended: report, and go on."""
        if version != replica.version or self.replicas.get(number) is not replica:
            return
        self._num_busy -= 1
        for delivery in replica.end():
            self._deliver(number, delivery)
        if self._events and self._events[0][:2] < (self.now, _BEGINS):
            self._plan(number, replica, self.now, self._begin, _BEGINS)
        else:
            self._begin(number, replica, version)

    # -- the API process -------------------------------------------------------------------------------------------

    def _arrive(self, request: WorkloadRequest, sent_at: float, user: User) -> None:
        """A request has come from its user."""
        record = request.record(sent_at)
        record.engine_id, record.num_prompt_tokens = request.request_id, len(request.prompt_token_ids)
        flight = self._flights[request.request_id] = _Flight(request, record, user)
        self._route(flight)

    def _route(self, flight: _Flight) -> None:
        """Hand a request to an engine; it waits for one if there is none."""
        request_id = flight.request.request_id
        if not self.replicas:
            self._flights[request_id] = flight._replace(number=None)
            return
        asked, config = flight.request, next(iter(self.replicas.values())).config
        hashes, size, num_tokens = list[bytes](), config.block_size, flight.record.num_prompt_tokens
        if config.enable_prefix_caching:
            extend_hashes(hashes, num_tokens // size, asked.prompt_token_ids, "", size)
        limit, full = config.max_num_seqs + config.max_num_waiting, list[int]()
        while True:
            number = self._routing.route(hashes, full)
            if len(self.replicas[number].requests) < limit or len(full) + 1 == len(self.replicas):
                break  # if all are full, the last one refuses it
            self._note_load(number)
            full.append(number)
        replica = self.replicas[number]
        self._flights[request_id] = flight._replace(number=number)
        replica.put(asked, hashes, self.now, flight.record.num_output_tokens)
        if not replica.is_busy:
            self._plan(number, replica, self.now, self._begin, _BEGINS)
        elif (end := replica.interrupt(self.now)) is not None:
            self._plan(number, replica, end, self._finish, _ENDS)

    def _deliver(self, number: int, delivery: Delivery) -> None:
        """Pass on tokens of steps that have ended."""
        record = self._flights[delivery.request_id].record
        record.token_times.append(delivery.seen_at)
        record.num_output_tokens += delivery.num_tokens
        record.num_cached_tokens += delivery.num_cached_tokens
        if delivery.is_last:
            del self.replicas[number].requests[delivery.request_id]
            self._end(number, delivery.request_id, delivery.seen_at)

    def _end(self, number: int, request_id: str, seen_at: float) -> None:
        """An answer ends, and its user goes on."""
        flight = self._flights.pop(request_id)
        self._note_load(number)
        flight.record.finished_at = seen_at
        self.note(flight.record)
        self._go_on(flight.user, seen_at)

    def _note_load(self, number: int) -> None:
        self._routing.set_load(number, len(self.replicas[number].requests))

    def note(self, record: RequestRecord) -> None:
        """A request has ended."""
        self.records[record.request_id] = record

    # -- users -----------------------------------------------------------------------------------------------------

    def _go_on(self, user: User, now: float, *, thinks: bool = True) -> None:
        """A user sends its next request, if it has one."""
        for pause, request in islice(user, 1):
            self._send(now + pause * thinks, request, user)

    def _send(self, sent_at: float, request: WorkloadRequest, user: User) -> None:
        self.at(sent_at + self._send_seconds, self._arrive, request, sent_at, user, rank=_COMES)

    def _await_arrival(self) -> None:
        """Have the next request of an open loop come."""
        for due_at, request in islice(self._arrivals, 1):
            self.at(due_at + self._send_seconds, self._arrive_in_turn, request, due_at, rank=_COMES)

    def _arrive_in_turn(self, request: WorkloadRequest, due_at: float) -> None:
        self._await_arrival()
        self._arrive(request, due_at, iter(()))
