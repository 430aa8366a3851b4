"""The workloads that are made here, each a function of a seed, and of the tokenizer that counts."""

from __future__ import annotations

from collections.abc import Callable

from shoal.loadtest.errors import WorkloadError
from shoal.loadtest.text import Tokenize
from shoal.loadtest.workload import WorkloadRequest
from shoal.loadtest.workloads.agent import agent
from shoal.loadtest.workloads.chat import chat
from shoal.loadtest.workloads.classes import mixed_priority, two_tenants
from shoal.loadtest.workloads.code import code
from shoal.loadtest.workloads.maker import MIN_MODEL_LEN, Maker
from shoal.loadtest.workloads.uniform import uniform

WORKLOADS: dict[str, Callable[[Maker], list[WorkloadRequest]]] = {
    "chat": chat,
    "code": code,
    "agent": agent,
    "uniform": uniform,
    "mixed-priority": mixed_priority,
    "two-tenants": two_tenants,
}


def make_workload(
    name: str, num_requests: int, seed: int, tokenize: Tokenize, max_model_len: int
) -> list[WorkloadRequest]:
    """Make a workload; the same arguments make the same one.

    Args:
        tokenize: as the server tokenizes the prompt of a completion.
        max_model_len: of the model; lengths are those for a context of 1,024 tokens, so that longer ones leave them be.

    Raises:
        WorkloadError: there is no such workload, no request in it, or no room for it in the model's context.
    """
    if name not in WORKLOADS:
        raise WorkloadError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    if num_requests < 1:
        raise WorkloadError(f"a workload must have at least 1 request, not {num_requests}")
    if max_model_len < MIN_MODEL_LEN:
        raise WorkloadError(f"workloads need a context of {MIN_MODEL_LEN} tokens; max_model_len is {max_model_len}")
    return WORKLOADS[name](Maker(name, num_requests, seed, tokenize))
