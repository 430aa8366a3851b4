"""Clusters in virtual time: every request ends once whatever happens to engines, and a seed replays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace as replace_limits
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.loadtest import cli
from shoal.loadtest.arrivals import Copies, open_arrivals
from shoal.loadtest.costs import CostModel
from shoal.loadtest.fleet import Fleet, FleetRun, simulate_fleet
from shoal.loadtest.metrics import Figures
from shoal.loadtest.profile import Profile
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, RequestRecord, Setup, write_json
from shoal.loadtest.replica import TwinEngine
from shoal.loadtest.sketch import Sketch
from shoal.loadtest.twin import played_engines
from shoal.loadtest.workload import WorkloadRequest, write_workload
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.plain_routing import ROUTINGS
from tests.fakes import named_policy
from tests.loadtest.twin import LIMITS, REALISTIC, SECONDS, ask, chat, server_info


def engines(policy: str, costs: CostModel = REALISTIC, limits: SchedulerConfig = LIMITS) -> Callable[[], TwinEngine]:
    """Sketches for fcfs, and played ones for others."""
    if policy == "fcfs":
        return partial(Sketch, limits, costs, {})
    return played_engines(lambda: named_policy(policy, limits, {}), costs, records_steps=False)


class Watched(FleetRun):
    """Keeps the requests in the order in which they ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ended: list[RequestRecord] = []
        super().__init__(*args, **kwargs)

    def note(self, record: RequestRecord) -> None:
        self.ended.append(record)
        super().note(record)


moments = st.floats(0, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100),
    router=st.sampled_from(list(ROUTINGS)),
    replicas=st.integers(1, 4),
    kills=st.lists(st.tuples(moments, st.integers(0, 3)), max_size=6),
    additions=st.lists(st.tuples(moments, st.integers(1, 2)), max_size=2),
    scales=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    num_blocks=st.sampled_from([70, 4096]),
    load=st.sampled_from([Load(users=8), Load(rate=40.0), Load(rate=200.0)]),
)
def test_every_request_ends_once_with_all_of_its_tokens(
    *,
    seed: int,
    router: str,
    replicas: int,
    kills: list[tuple[float, int]],
    additions: list[tuple[float, int]],
    scales: bool,
    policy: str,
    num_blocks: int,
    load: Load,
) -> None:
    workload = chat(40, seed)
    fleet = Fleet(
        replicas=replicas,
        router=router,
        autoscale=(1, 6) if scales else None,
        kills=tuple((time, number % replicas) for time, number in kills),
        additions=tuple(additions),
        start_seconds=0.5,
    )
    limits = replace_limits(LIMITS, num_blocks=num_blocks)
    run = Watched(
        workload,
        load,
        engines(policy, limits=limits),
        REALISTIC.send_seconds,
        num_replicas=replicas,
        routing=ROUTINGS[router](),
    )
    run.follow(fleet)
    run.run()
    ended = run.ended
    assert not any(engine.requests for engine in run.replicas.values())
    assert sorted(one.request_id for one in ended) == sorted(one.request_id for one in workload)
    lengths = {one.request_id: one.num_output_tokens for one in workload}
    for record in ended:
        assert record.error is None
        assert record.num_output_tokens == lengths[record.request_id]
        assert record.token_times == sorted(record.token_times)


def figures(fleet: Fleet, load: Load, num_requests: int = 300, policy: str = "fcfs", seed: int = 0) -> Figures:
    planned = PlannedRun(setup=Setup(policy=policy), workload="chat", load=load, repetition=seed)
    costs = replace(REALISTIC, deviations={0: (0.9, 1.1)})
    return simulate_fleet(planned, chat(num_requests), fleet, server=server_info(), costs=costs)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_seed_replays(policy: str) -> None:
    fleet = Fleet(replicas=3, router="pow2", kills=((0.3, 1),), start_seconds=1)
    load = Load(rate=200.0)
    assert figures(fleet, load, policy=policy) == figures(fleet, load, policy=policy)
    assert figures(fleet, load, policy=policy) != figures(fleet, replace(load, seed=1), policy=policy)
    assert figures(fleet, load, policy="priority") != figures(fleet, load, policy="priority", seed=1)


def test_more_engines_are_faster() -> None:
    one, four = (figures(Fleet(replicas=count), Load(rate=200.0)) for count in (1, 4))
    assert four["e2e p50"] < one["e2e p50"] / 2
    assert four["most to mean work"] < 1.5


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_request_goes_on_after_what_was_delivered(policy: str) -> None:
    """Its engine dies in its third step of a second; the other one begins a step with all that is known then."""
    workload = [ask("a", num_prompt_tokens=4, num_output_tokens=5)]
    run = FleetRun(workload, Load(users=1), engines(policy, SECONDS), 0.0, num_replicas=2)
    run.follow(Fleet(replicas=2, kills=((2.5, 0),), start_seconds=100))
    run.run()
    found = run.figures()
    assert (found["ttft p50"], found["e2e p50"], found["resumed"]) == (1.0, 5.5, 1)


def test_requests_wait_while_there_is_no_engine() -> None:
    found = figures(Fleet(replicas=1, kills=((0.01, 0),), start_seconds=50), Load(rate=200.0), 20)
    assert found["errors"] == 0
    assert found["e2e p50"] > 49


def test_answers_of_one_token_have_no_time_between_tokens() -> None:
    planned = PlannedRun(setup=Setup(policy="fcfs"), workload="", load=Load(users=1))
    workload = [ask("a", num_output_tokens=1), ask("b", num_output_tokens=1)]
    found = simulate_fleet(planned, workload, Fleet(), server=server_info(), costs=SECONDS)
    assert (found["e2e p50"], found["seconds"], "tpot p50" in found) == (1.0, 2.0, False)


def test_engines_come_and_go_with_the_load() -> None:
    fleet = Fleet(replicas=1, autoscale=(1, 8), start_seconds=1)
    grown = figures(fleet, Load(rate=150.0), 1500)
    assert grown["most replicas"] > 1
    idle = figures(Fleet(replicas=4, autoscale=(1, 8)), Load(rate=2.0), 120)
    assert idle["least replicas"] == 1
    assert idle["errors"] == grown["errors"] == 0


def test_prefixes_are_found_again_where_they_are() -> None:
    """Sixteen clients with a long prompt of their own."""
    random = Random(0)
    stems = [[random.randrange(10**6) for _ in range(256)] for _ in range(16)]
    workload = [
        replace(
            ask(f"r{n}", num_output_tokens=4), prompt_token_ids=[*random.choice(stems), *ask(f"r{n}").prompt_token_ids]
        )
        for n in range(320)
    ]
    shares = {}
    for router in ROUTINGS:
        planned = PlannedRun(setup=Setup(policy="fcfs"), workload="", load=Load(rate=100.0))
        fleet = Fleet(replicas=8, router=router)
        shares[router] = simulate_fleet(planned, workload, fleet, server=server_info(), costs=REALISTIC)["cached share"]
    assert shares["prefix"] > 0.9 and shares["hash"] > 0.9
    assert shares["load"] < 0.75 and shares["pow2"] < 0.75


def test_a_full_engine_is_passed_over() -> None:
    server = server_info(replace_limits(LIMITS, max_num_seqs=1, max_num_waiting=1))
    planned = PlannedRun(setup=Setup(policy="fcfs"), workload="", load=Load(users=5))
    workload = [ask(f"r{n}") for n in range(5)]
    found = simulate_fleet(planned, workload, Fleet(replicas=2, router="hash"), server=server, costs=SECONDS)
    assert found["errors"] == 1, "there is room for four"


# -- sketches ----------------------------------------------------------------------------------------------------------


def shared(num_requests: int, seed: int) -> list[WorkloadRequest]:
    """Chats of which most begin with one of a few prompts."""
    random = Random(seed)
    stems = [[random.randrange(10**6) for _ in range(random.randrange(50, 300))] for _ in range(8)]
    return [
        replace(request, prompt_token_ids=[*random.choice([*stems, []]), *request.prompt_token_ids])
        for request in chat(num_requests, seed)
    ]


LOADS = (Load(users=1), Load(users=8), Load(users=32), Load(rate=15.0), Load(rate=40.0, burstiness=4.0))


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("limits", [{}, {"num_blocks": 600}, {"max_num_seqs": 12}], ids=str)
def test_a_sketch_is_like_what_it_sketches(load: Load, limits: dict[str, int]) -> None:
    """Throughput and medians of one engine, played step by step and sketched."""
    costs = replace(REALISTIC, deviations={0: (0.9, 1.0, 1.2)})
    workload, config = shared(400, 1), replace_limits(LIMITS, **limits)
    played, sketched = (
        FleetRun(workload, load, engine, costs.send_seconds)
        for engine in (
            played_engines(lambda: named_policy("fcfs", config, {}), costs, records_steps=False),
            engines("fcfs", costs, config),
        )
    )
    played.run()
    sketched.run()
    expected, found = played.figures(), sketched.figures()
    for name in ("throughput", "ttft p50", "tpot p50", "e2e p50", "e2e mean"):
        assert found[name] == pytest.approx(expected[name], rel=0.06), name
    assert found["cached share"] == pytest.approx(expected["cached share"], abs=0.03)


# -- copies ------------------------------------------------------------------------------------------------------------


def test_copies_share_prefixes_with_their_own_kind_only() -> None:
    workload = [ask("a"), ask("b")]
    copies = Copies(workload, 5)
    assert [request.request_id for request in copies] == ["a-0", "a-1", "a-2", "b-0", "b-1"]
    assert len(copies) == 5
    assert copies[0].prompt_token_ids == workload[0].prompt_token_ids
    assert not set(copies[1].prompt_token_ids) & set(copies[0].prompt_token_ids)
    assert [due for due, _ in open_arrivals(Load(rate=1.0), copies)] == [
        due for due, _ in open_arrivals(Load(rate=1.0), [ask(str(n)) for n in range(5)])
    ]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"router": "best"}, "router: unknown 'best'; known are prefix, load, hash, pow2"),
        ({"replicas": 3, "autoscale": (4, 8)}, "autoscale: 3 replicas must be within 4:8"),
        ({"replicas": 3, "kills": ((1.0, 3),)}, "kill: there is no replica 3; they are numbered from 0 to 2"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(asked: dict[str, object], complaint: str) -> None:
    with pytest.raises(LoadTestError, match=complaint):
        Fleet(**asked)  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--router", "load"], "need --replicas"),
        (["--replicas", "2", "--kill", "soon:1"], "'--kill': 'soon' is not a valid float"),
        (["--replicas", "2", "--kill", "3"], "'--kill': '' is not a valid integer"),
        (["--replicas", "2", "--autoscale", "1"], "'--autoscale': '' is not a valid integer"),
    ],
)
def test_options_that_make_no_sense_are_refused(args: list[str], complaint: str) -> None:
    result = CliRunner().invoke(cli.simulate, args)
    assert result.exit_code == 2
    assert complaint in result.stderr


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_compares_routers_and_copies_a_workload(tmp_path: Path) -> None:
    write_json(tmp_path / "profile.json", Profile(server=server_info(), costs=REALISTIC))
    write_workload(tmp_path / "workload-chat.jsonl", chat(20))
    args = ["--costs", str(tmp_path), "--workload", "chat", "--rate", "100", "--requests", "50", "--replicas", "3"]
    result = CliRunner().invoke(cli.simulate, [*args, "--router", "load,hash", "--kill", "0.1:2", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(one["router"], one["requests"], one["errors"]) for one in found] == [("load", 50, 0), ("hash", 50, 0)]
    assert "resumed" in CliRunner().invoke(cli.simulate, args).stdout


def test_the_command_writes_traces_and_reads_them(tmp_path: Path) -> None:
    write_json(tmp_path / "profile.json", Profile(server=server_info(), costs=REALISTIC))
    write_workload(tmp_path / "workload-chat.jsonl", chat(20))
    costs, trace = ["--costs", str(tmp_path)], tmp_path / "trace.csv"
    asked = ["--workload", "chat", "--rate", "9", "--requests", "20", "--write", str(trace)]
    assert CliRunner().invoke(cli.simulate, [*costs, *asked]).stdout == f"{trace}: 20 requests\n"
    result = CliRunner().invoke(cli.simulate, [*costs, "--replay", str(trace), "--replicas", "1", "--json"])
    assert [one["requests"] for one in json.loads(result.stdout)] == [20]
    refused = CliRunner().invoke(cli.simulate, [*costs, *asked, "--users", "2"])
    assert (refused.exit_code, "not both" in refused.stderr) == (2, True)
