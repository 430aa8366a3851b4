"""mixed-priority and two-tenants: two classes of requests, every eighth of the rarer one."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.loadtest.text import prompt, prose
from shoal.loadtest.workload import WorkloadRequest
from shoal.loadtest.workloads.maker import Maker

EVERY = 8
MAX_TOKENS = 400


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Requests of one kind: numbers of tokens are uniformly distributed from the first to the second, both included."""

    client: str
    num_prompt_tokens: tuple[int, int]
    num_output_tokens: tuple[int, int]
    priority: int = 0
    ttft_slo_ms: float | None = None


# Ten levels apart, so that ageing brings nobody of the crowd before an urgent request for long.
URGENT = RequestClass("urgent", (16, 48), (8, 32), priority=0, ttft_slo_ms=200.0)
ORDINARY = RequestClass("ordinary", (100, 300), (100, 300), priority=10)

MODEST = RequestClass("modest", (32, 64), (16, 48))
GREEDY = RequestClass("greedy", (200, 400), (100, 300))


def mixed_priority(maker: Maker) -> list[WorkloadRequest]:
    """A few urgent short requests among a crowd of long ordinary ones."""
    return _mixed(maker, URGENT, ORDINARY)


def two_tenants(maker: Maker) -> list[WorkloadRequest]:
    """A client with many long requests, and one with few short ones."""
    return _mixed(maker, MODEST, GREEDY)


def _mixed(maker: Maker, rare: RequestClass, common: RequestClass) -> list[WorkloadRequest]:
    return [_request(maker, index, common if (index + 1) % EVERY else rare) for index in range(maker.num_requests)]


def _request(maker: Maker, index: int, kind: RequestClass) -> WorkloadRequest:
    rng = maker.rng
    return maker.request(
        index,
        prompt("", prose, rng, rng.randint(*kind.num_prompt_tokens), maker.tokenize),
        num_output_tokens=rng.randint(*kind.num_output_tokens),
        max_tokens=MAX_TOKENS,
        is_greedy=rng.random() < 0.5,
        client=kind.client,
        priority=kind.priority,
        ttft_slo_ms=kind.ttft_slo_ms,
    )
