"""What the tests of the digital twin share: workloads and costs that are easy to reckon with."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

from shoal.loadtest.costs import CostModel
from shoal.loadtest.records import Load, PlannedRun, Run, ServerInfo, Setup
from shoal.loadtest.twin import simulate
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.policies import POLICIES

LIMITS = SchedulerConfig(num_blocks=4096, max_model_len=1024)
KNOBS = {knob.name: knob.default for kind in POLICIES.values() for knob in fields(kind.Knobs)}
# Every step takes a second.
SECONDS = CostModel(token_seconds={1: 1.0, 2: 1.0})
# Of the order of a small model's on two cores; steps get cheaper by the token as they grow.
REALISTIC = CostModel(
    token_seconds={1: 0.0007, 4: 0.0015, 16: 0.003, 64: 0.006, 512: 0.04},
    pair_seconds=2e-8,
    key_seconds=3e-7,
    sample_seconds=1e-5,
    stream_seconds=4e-5,
    send_seconds=1e-3,
    delivery_seconds=3.5e-4,
)


def ask(
    request_id: str, num_prompt_tokens: int = 4, num_output_tokens: int = 2, session: str = "", **others: object
) -> WorkloadRequest:
    """A request whose prompt is like nobody else's."""
    first = random.Random(request_id).randrange(10**6)
    values: dict[str, object] = {"max_tokens": 50, "prompt": request_id}
    return WorkloadRequest(
        request_id=request_id,
        session=session or request_id,
        prompt_token_ids=list(range(first, first + num_prompt_tokens)),
        num_output_tokens=num_output_tokens,
        **(values | others),  # type: ignore[arg-type]  # any field
    )


def chat(num_requests: int, seed: int = 0, num_prompt_tokens: int = 70) -> list[WorkloadRequest]:
    """Requests with heavy-tailed lengths, from a few clients."""
    rng = random.Random(seed)
    return [
        ask(
            f"r{index}",
            min(max(int(num_prompt_tokens * rng.lognormvariate(0, 0.8)), 1), 700),
            min(max(int(60 * rng.lognormvariate(0, 1)), 1), 300),
            max_tokens=300,
            client=f"client {rng.randrange(4)}",
            priority=rng.randrange(3),
        )
        for index in range(num_requests)
    ]


def run(
    workload: list[WorkloadRequest],
    load: Load,
    policy: str = "fcfs",
    costs: CostModel = SECONDS,
    *,
    knobs: dict[str, Any] | None = None,
    repetition: int = 0,
    **limits: int | bool,
) -> Run:
    """Simulate with these limits."""
    server = server_info(replace(LIMITS, **limits), knobs)  # type: ignore[arg-type]  # any limit
    planned = PlannedRun(setup=Setup(policy=policy), workload="", load=load, repetition=repetition)
    return simulate(planned, workload, server=server, costs=costs)


def server_info(limits: SchedulerConfig = LIMITS, knobs: dict[str, Any] | None = None) -> ServerInfo:
    """What a server with these limits and knobs says of itself."""
    settings: dict[str, Any] = {
        "engine": {"threads": 2, "trace": "trace.json"},
        "cache": {"num_blocks": None, "kv_cache_dtype": "auto"},
        "scheduler": {"policy": "fcfs", "max_num_seqs": limits.max_num_seqs} | KNOBS | (knobs or {}),
    }
    return ServerInfo(model="m", limits=limits, settings=settings)
