"""What is asked of a server in a load test: requests with the lengths of their outputs, saved as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

from loadtest.errors import WorkloadError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request of a workload.

    Attributes:
        request_id: unique in its workload.
        session: requests of one session follow each other, each after the answer to the one before; a request alone
            is a session of its own.
        client: whose it is, sent as `user`; empty if nobody's.
        prompt: text.
        prompt_token_ids: the same for the model that the workload was made for; the simulator needs them.
        num_output_tokens: how long the output will be, which the server enforces (`end_after`).
        max_tokens: the limit that the request names, the same in a whole workload, so that it tells nothing.
        temperature, seed: of sampling.
        priority, ttft_slo_ms, tpot_slo_ms: for the policy; None leaves them to the server.
        arrival_time: seconds after the start at which an open loop sends it; None where the load decides.
    """

    request_id: str
    session: str
    client: str = ""
    prompt: str
    prompt_token_ids: list[int]
    num_output_tokens: int
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    priority: int = 0
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    arrival_time: float | None = None


def write_workload(path: Path, requests: Iterable[WorkloadRequest]) -> None:
    """Save requests, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(json.dumps(asdict(request), ensure_ascii=False) + "\n")


def read_workload(path: Path) -> list[WorkloadRequest]:
    """Read what `write_workload` saved.

    Raises:
        WorkloadError: there is no such file, no request in it, or a line is broken, which is named by its number.
    """
    ...
