"""A twin that leaps over plain steps says the same, to the bit, as one that plays each of them."""

from __future__ import annotations

from dataclasses import replace as replace_limits
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.loadtest.records import Load, RequestRecord
from shoal.loadtest.twin import Simulation, played_engines
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.policies import POLICIES
from tests.fakes import named_policy
from tests.loadtest.twin import LIMITS, REALISTIC, ask

COSTS = replace(REALISTIC, deviations={1: (0.8, 1.0, 1.2), 3: (0.9, 1.1)})
TIGHT = replace_limits(LIMITS, max_num_seqs=5, max_num_batched_tokens=48, max_chunk_tokens=32)
KNOBS = {"ageing_seconds": 0.5, "ageing_tokens": 40, "static_timeout_seconds": 0.0305, "fair_lead": 20}


def crowd(seed: int, num_requests: int) -> list[WorkloadRequest]:
    """Requests of several clients, half of which share the begin of their prompts."""
    random = Random(seed)
    return [
        replace(
            ask(f"r{n}", num_output_tokens=random.randint(1, 120), client=random.choice("ab"), max_tokens=120),
            prompt_token_ids=[*range(random.choice([0, 40])), *random.choices(range(1000), k=random.randint(1, 60))],
            priority=random.randrange(3),
            arrival_time=random.uniform(0, 2),
        )
        for n in range(num_requests)
    ]


def play(
    workload: list[WorkloadRequest], load: Load, policy: str, num_blocks: int, *, replicas: int, leaps: bool
) -> tuple[dict[str, RequestRecord], int]:
    """The requests by id, and how many steps were scheduled one by one."""
    limits = replace_limits(TIGHT, num_blocks=num_blocks)
    engine = played_engines(lambda: named_policy(policy, limits, KNOBS), COSTS, records_steps=not leaps)
    simulation = Simulation(workload, load, engine, COSTS.send_seconds, num_replicas=replicas)
    num_steps = 0
    for replica in simulation.replicas.values():
        schedule = replica.scheduler.schedule

        def counted(now: float, schedule: object = schedule) -> object:
            nonlocal num_steps
            num_steps += 1
            return schedule(now)  # type: ignore[operator]

        replica.scheduler.schedule = counted  # type: ignore[method-assign, assignment]
    simulation.run()
    for replica in simulation.replicas.values():
        check_invariants(replica.scheduler)
    return simulation.records, num_steps


def seen(records: dict[str, RequestRecord]) -> dict[str, RequestRecord]:
    """The requests, and of their tokens the times of the first and the last."""
    return {
        name: replace(record, token_times=record.token_times[:: len(record.token_times) - 1 or 1])
        for name, record in records.items()
    }


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    num_blocks=st.sampled_from([14, 30, 500]),
    load=st.sampled_from([Load(), Load(users=3), Load(users=12, think_seconds=0.1), Load(rate=300.0)]),
    replicas=st.integers(1, 3),
)
def test_leaps_change_nothing(policy: str, seed: int, num_blocks: int, load: Load, replicas: int) -> None:
    workload = crowd(seed, 20)
    leaping, stepping = (
        play(workload, load, policy, num_blocks, replicas=replicas, leaps=leaps)[0] for leaps in (True, False)
    )
    assert seen(leaping) == seen(stepping)
    assert all(record.num_output_tokens == len(record.token_times) for record in stepping.values())


def test_most_steps_are_leapt_over() -> None:
    workload = crowd(1, 60)
    (leaping, few), (stepping, many) = (
        play(workload, Load(users=4), "fcfs", 500, replicas=1, leaps=leaps) for leaps in (True, False)
    )
    assert seen(leaping) == seen(stepping)
    assert few < many / 5
