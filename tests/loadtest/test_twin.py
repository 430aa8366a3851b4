"""The digital twin against schedules made by hand, and against what must hold whatever happens."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace as replace_limits

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.loadtest.arrivals import closed_sessions
from shoal.loadtest.costs import StepShape
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, RequestRecord, Run, Setup
from shoal.loadtest.trace import stays
from shoal.loadtest.twin import SJF_ORACLE, Simulation, played_engines, simulate
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import RequestOutput
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.policies.fcfs import FirstComeFirstServed
from shoal.scheduler.request import Request
from tests.fakes import named_policy
from tests.loadtest.twin import LIMITS, REALISTIC, SECONDS, ask, chat, run, server_info


def times(run: Run) -> dict[str, tuple[float, list[float], float | None]]:
    """When each request was sent, its tokens came, and it ended."""
    return {record.request_id: (record.sent_at, record.token_times, record.finished_at) for record in run.requests}


def sent(run: Run) -> dict[str, float]:
    return {record.request_id: record.sent_at for record in run.requests}


def record(run: Run, request_id: str) -> RequestRecord:
    return next(record for record in run.requests if record.request_id == request_id)


def generate(workload: list[WorkloadRequest], load: Load, policy: str, limits: SchedulerConfig) -> dict[str, list[int]]:
    """Simulate, check what must hold in each run, and return the tokens of each request."""
    made = named_policy(policy, limits, {"ageing_seconds": 1, "static_timeout_seconds": 0.05})
    simulation = Simulation(workload, load, played_engines(lambda: made, REALISTIC), REALISTIC.send_seconds)
    found: dict[str, list[int]] = {request.request_id: [] for request in workload}
    core = simulation.replicas[0].core
    step = core.step

    def step_and_note() -> list[RequestOutput]:
        news = step()
        for one in news:
            found[one.request_id] += one.token_ids
        return news

    core.step = step_and_note  # type: ignore[method-assign]
    simulation.run()
    scheduler = core.scheduler
    check_invariants(scheduler)
    assert scheduler.kv_cache.pool.num_available == limits.num_blocks, "blocks are free after a drain"
    steps = [step for step in simulation.replicas[0].steps if step.shares]
    for request in workload:
        record, stay = simulation.records[request.request_id], stays(steps)[request.request_id]
        assert record.num_output_tokens == len(record.token_times) == request.num_output_tokens
        assert record.error is None
        assert record.finished_at is not None
        moments = [record.sent_at, stay.arrived_at, stay.joined_at, *record.token_times, record.finished_at]
        assert moments == sorted(moments)
    ends = [step.start + step.seconds for step in steps]
    assert all(step.start >= end - 1e-9 for step, end in zip(steps[1:], ends, strict=False)), "steps overlap"
    return found


# -- users -------------------------------------------------------------------------------------------------------------


def test_a_user_sends_its_next_request_when_the_one_before_is_answered() -> None:
    found = run([ask("a"), ask("b", num_output_tokens=1)], Load(users=1))
    assert times(found) == {"a": (0, [1, 2], 2), "b": (2, [3], 3)}
    assert found.is_complete


def test_users_think_before_each_request_but_their_first() -> None:
    load = Load(users=1, think_seconds=5, seed=3)
    workload = [ask("a"), ask("b"), ask("c")]
    thought = [session[0].seconds for session in closed_sessions(load, workload)]
    found = run(workload, load)
    assert sent(found) == {"a": 0, "b": 2 + thought[1], "c": pytest.approx(2 + thought[1] + 2 + thought[2])}


def test_sessions_are_dealt_in_file_order_and_sent_request_by_request() -> None:
    workload = [
        ask("a1", session="a", num_output_tokens=3),
        ask("b1", session="b", num_output_tokens=1),
        ask("a2", session="a"),
        ask("c1", session="c"),
        ask("d1", session="d"),
    ]
    # One user has session a until 5.  The other is done with b at 1, with c at 3, and then takes d.
    assert sent(run(workload, Load(users=2))) == {"a1": 0, "b1": 0, "c1": 1, "a2": 3, "d1": 3}


def test_more_users_than_sessions_leave_some_idle() -> None:
    assert sent(run([ask("a"), ask("b")], Load(users=9))) == {"a": 0, "b": 0}


def test_an_open_loop_does_not_wait_for_the_server() -> None:
    workload = [ask("a", arrival_time=0.5), ask("b", arrival_time=1.0), ask("c", arrival_time=9.0)]
    found = run(workload, Load())
    # The engine wakes for a at 0.5; b comes while its first step runs, and joins the one after.
    assert times(found) == {"a": (0.5, [1.5, 2.5], 2.5), "b": (1.0, [2.5, 3.5], 3.5), "c": (9, [10, 11], 11)}


def test_an_open_loop_with_a_rate_draws_its_own_times() -> None:
    found = run([ask(f"r{index}", arrival_time=0.0) for index in range(200)], Load(rate=10.0))
    assert found.requests[-1].sent_at == pytest.approx(20, rel=0.25)


# -- latencies outside the engine --------------------------------------------------------------------------------------

LATE = replace(SECONDS, send_seconds=1, delivery_seconds=1 / 8)


def test_a_request_takes_its_time_on_the_way_and_its_tokens_too() -> None:
    found = run([ask("a"), ask("b")], Load(users=1), costs=LATE)
    taken = 1
    seen = taken + 1 + 1 / 8
    assert times(found)["a"] == (0, [seen, seen + 1], seen + 1)
    assert times(found)["b"][0] == seen + 1
    assert stays(found.steps)["a"] == (taken, taken)


# -- the engine --------------------------------------------------------------------------------------------------------


def test_a_static_batch_waits_for_its_timeout() -> None:
    knobs = {"static_timeout_seconds": 0.25}
    found = run([ask("a")], Load(users=1), "static", knobs=knobs, max_num_seqs=2)
    assert times(found)["a"][1] == [1.25, 2.25]


def test_a_static_batch_does_not_wait_once_it_is_full() -> None:
    knobs = {"static_timeout_seconds": 0.25}
    workload = [ask("a", arrival_time=0.0), ask("b", arrival_time=0.125), ask("c", arrival_time=0.5)]
    found = run(workload, Load(), "static", knobs=knobs, max_num_seqs=2)
    assert {name: joined.joined_at for name, joined in stays(found.steps).items()} == {
        "a": 0.125,
        "b": 0.125,
        "c": 2.125,  # it has waited for longer than the timeout when the batch ends
    }


def test_sockets_wait_for_whole_milliseconds() -> None:
    knobs = {"static_timeout_seconds": 0.0301}
    assert stays(run([ask("a")], Load(users=1), "static", knobs=knobs).steps)["a"].joined_at == 0.031


def test_padding_rows_cost_their_step_and_bring_nothing() -> None:
    found = run([ask("a", num_output_tokens=3), ask("b", num_output_tokens=1)], Load(users=2), "static", max_num_seqs=2)
    assert [
        [(share.request_id, share.row, share.num_scheduled_tokens, share.is_padding) for share in step.shares]
        for step in found.steps
    ] == [
        [("a", 0, 4, False), ("b", 1, 4, False)],
        [("b", 1, 1, True), ("a", 0, 1, False)],
        [("b", 1, 1, True), ("a", 0, 1, False)],
    ]
    assert times(found)["b"] == (0, [1], 1), "a request that has ended is answered at once"


def test_a_row_is_taken_again_when_it_is_free() -> None:
    workload = [ask("a", num_output_tokens=1), ask("b", num_output_tokens=4), ask("c", num_output_tokens=1)]
    found = run(workload, Load(users=2))
    assert [(share.request_id, share.row) for share in found.steps[1].shares] == [("b", 1), ("c", 0)]


def test_a_steps_figures_are_those_of_its_schedule() -> None:
    first, second = run([ask("a", num_prompt_tokens=20)], Load(users=1)).steps
    shapes = [StepShape.of(step.shares) for step in (first, second)]
    assert [(shape.num_pairs, shape.num_keys) for shape in shapes] == [(20 * 21 // 2, 20), (21, 21)]
    assert (first.num_blocks, first.num_used_blocks, first.num_kv_tokens, first.num_waiting) == (4096, 2, 20, 0)
    assert (second.start, second.seconds, second.execute_seconds, second.num_kv_tokens) == (1, 1, 1, 21)


def test_prompts_that_start_alike_are_found() -> None:
    prompt = list(range(100))
    workload = [
        replace(ask("a"), prompt_token_ids=prompt),
        replace(ask("b"), prompt_token_ids=[*prompt[:50], *range(900, 950)]),
    ]
    assert record(run(workload, Load(users=1)), "b").num_cached_tokens == 48
    assert record(run(workload, Load(users=1), enable_prefix_caching=False), "b").num_cached_tokens == 0


def test_generated_tokens_are_nobody_elses_prefix() -> None:
    workload = [replace(ask(name, num_output_tokens=40), prompt_token_ids=list(range(16))) for name in "ab"]
    found = generate(workload, Load(users=2), "fcfs", LIMITS)
    assert len(found["a"]) == len(found["b"]) == 40
    assert found["a"][-1] == found["b"][-1], "the stop token"
    assert not set(found["a"][:-1]) & set(found["b"][:-1])


def test_requests_that_lose_their_blocks_are_computed_again() -> None:
    workload = [ask(f"r{index}", 16, 40) for index in range(3)]
    found = run(workload, Load(users=3), num_blocks=8)
    assert any(step.preempted for step in found.steps)
    assert [record.num_output_tokens for record in found.requests] == [40] * 3


def test_what_the_server_would_refuse_is_refused() -> None:
    workload = [ask("a"), ask("b"), ask("c", 1000), ask("d")]
    found = run(workload, Load(users=2), max_num_seqs=1, max_num_waiting=0)
    assert "the server is full" in (record(found, "b").error or "")
    assert "prompt has 1000 tokens" in (record(found, "c").error or "")
    assert [record(found, name).num_output_tokens for name in "abcd"] == [2, 0, 0, 2]


def test_deviations_are_seeded_and_keep_the_profiles_mean() -> None:
    costs = replace(SECONDS, deviations={1: (0.5, 0.75, 1.75)})
    workload = [ask("a", num_output_tokens=999, max_tokens=999)]
    found = [run(workload, Load(users=1), costs=costs, repetition=repetition) for repetition in (0, 0, 1)]
    assert times(found[0]) == times(found[1]) != times(found[2])
    assert sorted({round(step.seconds, 6) for step in found[0].steps}) == [0.5, 0.75, 1.75]
    assert found[0].requests[0].finished_at == pytest.approx(999, rel=0.05)


# -- policies ----------------------------------------------------------------------------------------------------------


class Spy(FirstComeFirstServed):
    """Notes all that a policy may see of a request that arrives."""

    def __init__(self) -> None:
        super().__init__(LIMITS, self.Knobs())
        self.seen: list[dict[str, object]] = []

    def on_arrival(self, request: Request) -> None:
        self.seen.append({name: deepcopy(getattr(request, name)) for name in Request.__slots__})


def test_no_policy_sees_how_long_an_output_will_be() -> None:
    spies = [Spy(), Spy()]
    for spy, length in zip(spies, (1, 30), strict=True):
        workload = [ask("a", num_output_tokens=length, client="me", priority=2, ttft_slo_ms=5.0, tpot_slo_ms=6.0)]
        Simulation(workload, Load(users=1), played_engines(lambda spy=spy: spy, SECONDS), 0.0).run()
    assert spies[0].seen == spies[1].seen
    assert len(spies[0].seen) == 1


def test_the_oracle_knows_what_sjf_has_to_guess() -> None:
    workload = [ask(f"r{index}", num_output_tokens=length) for index, length in enumerate((40, 30, 20, 10))]
    found = run(workload, Load(users=4), SJF_ORACLE, max_num_seqs=1)
    prompts = [share.request_id for step in found.steps for share in step.shares if share.num_scheduled_tokens > 1]
    assert prompts == ["r3", "r2", "r1", "r0"]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'lifo'; known are deadline"):
        run([ask("a")], Load(users=1), "lifo")


def test_speculation_is_refused() -> None:
    planned = PlannedRun(setup=Setup(policy="fcfs", speculation="draft"), workload="", load=Load(users=1))
    with pytest.raises(LoadTestError, match="'draft' cannot be simulated"):
        simulate(planned, [ask("a")], server=server_info(), costs=SECONDS)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=14),
    users=st.integers(0, 6),
    rate=st.sampled_from([20.0, 500.0]),
    num_blocks=st.integers(6, 40),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.integers(0, 60),
)
def test_every_policy_ends_all_requests_with_the_same_tokens(
    *,
    lengths: list[tuple[int, int, int]],
    users: int,
    rate: float,
    num_blocks: int,
    max_num_seqs: int,
    spare_budget: int,
) -> None:
    workload = [
        ask(
            f"r{index}",
            num_prompt,
            num_output,
            session=f"s{group}-{users and index // 3}",
            max_tokens=30,
            priority=group,
        )
        for index, (num_prompt, num_output, group) in enumerate(lengths)
    ]
    limits = replace_limits(
        LIMITS, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + spare_budget
    )
    load = Load(users=users, rate=0.0 if users else rate)
    found = [generate(workload, load, policy, limits) for policy in POLICIES]
    assert all(one == found[0] for one in found)


def test_a_large_run_has_the_shape_of_a_real_one() -> None:
    found = {policy: run(chat(150), Load(users=32), policy, REALISTIC) for policy in ("fcfs", "static-nopad", "static")}
    ends = {policy: max(record.finished_at or 0 for record in one.requests) for policy, one in found.items()}
    assert ends["fcfs"] < ends["static-nopad"] < ends["static"]
