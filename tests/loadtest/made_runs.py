"""Runs by simple arithmetic: what a closed loop of users would see of an engine whose steps cost a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from shoal.loadtest.costs import CostModel
from shoal.loadtest.records import Load, RequestRecord, Run, ServerInfo, Setup
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.step_record import ShareRecord, StepRecord

BASE_SECONDS, ROW_SECONDS, PROMPT_TOKEN_SECONDS = 4e-3, 2e-4, 5e-5
BLOCK_SIZE, NUM_BLOCKS = 16, 1024

COSTS = CostModel(
    token_seconds={1: BASE_SECONDS, 1000: BASE_SECONDS + 999 * PROMPT_TOKEN_SECONDS},
    sample_seconds=ROW_SECONDS,
)
SERVER = ServerInfo(
    limits=SchedulerConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=1024),
    settings={"scheduler": {"static_timeout_seconds": 0.5}},
)


def step(start: float, *shares: ShareRecord, seconds: float = 1.0, **values: object) -> StepRecord:
    """A step of these shares, in which nothing else happens unless it is named."""
    nothing: dict[str, object] = {"joined": {}, "preempted": [], "left": []}
    counts = dict.fromkeys(("num_waiting", "num_preemptions", "num_used_blocks", "num_kv_tokens"), 0)
    nothing |= counts | {"num_running": len(shares), "num_blocks": 10, "execute_seconds": seconds}
    return StepRecord(number=0, start=start, shares=list(shares), **nothing | values)  # type: ignore[arg-type]


def share(
    row: int,
    name: str,
    tokens: int = 1,
    *,
    drafted: int = 0,
    samples: bool = True,
    padding: bool = False,
    computed: int = 0,
) -> ShareRecord:
    return ShareRecord(name, row, computed, tokens, drafted, samples, padding)


def cost(tokens: list[int]) -> float:
    prompt_tokens = sum(tokens) - len(tokens)
    return BASE_SECONDS + ROW_SECONDS * len(tokens) + PROMPT_TOKEN_SECONDS * prompt_tokens


@dataclass(slots=True)
class _Occupant:
    record: RequestRecord
    num_prompt_tokens: int
    num_output_tokens: int
    num_chosen: int = 0

    @property
    def is_padding(self) -> bool:
        return self.num_chosen == self.num_output_tokens

    @property
    def num_blocks(self) -> int:
        return -(-(self.num_prompt_tokens + self.num_chosen) // BLOCK_SIZE)


def make_run(
    policy: str,
    *,
    speculation: str = "off",
    workload: str = "chat",
    users: int = 8,
    num_requests: int = 40,
    num_rows: int = 8,
    repetition: int = 0,
    noise: float = 0.0,
    client: Callable[[int], str] = lambda number: "",
    priority: Callable[[int], int] = lambda number: 0,
) -> Run:
    """A run of which the policies "static" and "static-nopad" fill all rows at once, all others one by one."""
    sizes, hiccups = Random(1), Random(repetition)
    requests = [
        (int(sizes.lognormvariate(3.5, 0.6)) + 2, int(sizes.lognormvariate(3.2, 0.8)) + 2) for _ in range(num_requests)
    ]
    records: list[RequestRecord] = []
    waiting: list[_Occupant] = []
    rows: dict[int, _Occupant] = {}
    steps: list[StepRecord] = []
    now = 0.0

    def send() -> None:
        number = len(records)
        if number < num_requests:
            prompt, output = requests[number]
            records.append(
                RequestRecord(
                    request_id=f"r{number}",
                    client=client(number),
                    priority=priority(number),
                    engine_id=f"cmpl-{number}",
                    sent_at=now,
                    num_prompt_tokens=prompt,
                    text_hash=f"{number:x}",
                )
            )
            waiting.append(_Occupant(records[-1], prompt, output))

    for _ in range(users):
        send()
    while waiting or any(not occupant.is_padding for occupant in rows.values()):
        is_static, joined, left = policy.startswith("static"), {}, []
        if all(occupant.is_padding for occupant in rows.values()):
            left += [occupant.record.engine_id for occupant in rows.values()]
            rows.clear()
        if policy != "static":
            left += [occupant.record.engine_id for occupant in rows.values() if occupant.is_padding]
            rows = {row: occupant for row, occupant in rows.items() if not occupant.is_padding}
        if not is_static or not rows:
            for row in sorted(set(range(num_rows)) - rows.keys())[: len(waiting)]:
                rows[row] = waiting.pop(0)
                joined[rows[row].record.engine_id] = now - rows[row].record.sent_at
        shares = [
            share(
                row,
                occupant.record.engine_id,
                1 if occupant.num_chosen else occupant.num_prompt_tokens,
                padding=occupant.is_padding,
                computed=occupant.num_prompt_tokens + occupant.num_chosen - 1 if occupant.num_chosen else 0,
            )
            for row, occupant in sorted(rows.items())
        ]
        seconds = cost([one.num_scheduled_tokens for one in shares]) * (1 + noise * hiccups.random())
        working = [occupant for occupant in rows.values() if not occupant.is_padding]
        steps.append(
            step(
                now,
                *shares,
                seconds=seconds,
                joined=joined,
                left=left,
                num_waiting=len(waiting),
                num_blocks=NUM_BLOCKS,
                num_used_blocks=sum(occupant.num_blocks for occupant in rows.values()),
                num_kv_tokens=sum(o.num_prompt_tokens + o.num_chosen for o in rows.values()),
            )
        )
        now += seconds + 1e-4
        for occupant in working:
            occupant.num_chosen += 1
            occupant.record.num_output_tokens += 1
            occupant.record.token_times.append(now)
            if occupant.is_padding:
                occupant.record.finished_at = now
                send()
    return Run(
        setup=Setup(policy=policy, speculation=speculation),
        workload=workload,
        load=Load(users=users, seed=repetition),
        repetition=repetition,
        server=SERVER,
        requests=records,
        steps=steps,
        generator_cpu_seconds=0.05 * now,
    )
