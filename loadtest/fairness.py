"""How evenly clients were served."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from shoal.loadtest.records import RequestRecord

WINDOW_SECONDS = 1.0
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0  # of a token as service, as VTC has them

Interval = tuple[float, float]


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 if all have the same, 1/n if one of n has everything (Jain, Chiu and Hawe 1984).

    Shares are at least 0; if nobody has anything, all have the same.
    """
    total = sum(shares)
    if not total:
        return 1.0
    # Divided by the largest first, so that squares neither vanish nor overflow.
    scaled = [share / max(shares) for share in shares]
    return sum(scaled) ** 2 / (len(scaled) * sum(share * share for share in scaled))


def fairness(records: Sequence[RequestRecord], end: float) -> float | None:
    """Jain's index of the clients' service, the mean over windows of a second; None if never two asked at once.

    Service is counted as in VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models"): one for a token of
    a prompt, two for an output token, each when its user saw that it was done.  What it compares is backlogged clients
    only, for those who asked for little and got it were not wronged: in each window, the share of a client of whose
    requests one or another waited for its first token all the time is its service over that of the client that was
    served most; the share of any other that asked for something is 1.

    Args:
        end: of the run, in its own time, until which what was never answered is taken to wait.
    """
    num_windows = ceil(end / WINDOW_SECONDS)
    clients: defaultdict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        clients[record.client].append(record)
    if len(clients) < 2 or not num_windows:
        return None
    service = np.array([_service(own, num_windows) for own in clients.values()])
    active = np.array([_overlapped(_asking(own, end), num_windows) for own in clients.values()])
    backlogged = np.array([_covered(_waiting(own, end), num_windows) for own in clients.values()])
    most = service.max(axis=0)
    shares = np.divide(service, most, out=np.ones_like(service), where=backlogged & (most > 0))
    indices = [
        jain(shares[active[:, window], window].tolist())
        for window in range(num_windows)
        if active[:, window].sum() >= 2
    ]
    return float(np.mean(indices)) if indices else None


def _service(records: Iterable[RequestRecord], num_windows: int) -> NDArray[np.float64]:
    """Service in each window."""
    service = np.zeros(num_windows)
    for record in records:
        if times := record.token_times:
            places = np.minimum(np.array(times) // WINDOW_SECONDS, num_windows - 1).astype(int)
            np.add.at(service, places, OUTPUT_WEIGHT * record.num_output_tokens / len(times))
            service[places[0]] += PROMPT_WEIGHT * record.num_prompt_tokens
    return service


def _asking(records: Iterable[RequestRecord], end: float) -> list[Interval]:
    return [(record.sent_at, end if record.finished_at is None else record.finished_at) for record in records]


def _waiting(records: Iterable[RequestRecord], end: float) -> list[Interval]:
    """When one or another waited for its first token: intervals that do not touch each other."""
    merged: list[Interval] = []
    for start, until in sorted(
        (r.sent_at, r.token_times[0] if r.token_times else r.finished_at or end) for r in records
    ):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until))
        else:
            merged.append((start, until))
    return merged


def _overlapped(intervals: Iterable[Interval], num_windows: int) -> NDArray[np.bool_]:
    """Windows of which some moment lies in one of the intervals."""
    found = np.zeros(num_windows, dtype=bool)
    for start, end in intervals:
        found[floor(start / WINDOW_SECONDS) : ceil(end / WINDOW_SECONDS)] = True
    return found


def _covered(intervals: Iterable[Interval], num_windows: int) -> NDArray[np.bool_]:
    """Windows that lie in one of the intervals."""
    found = np.zeros(num_windows, dtype=bool)
    for start, end in intervals:
        found[ceil(start / WINDOW_SECONDS) : floor(end / WINDOW_SECONDS)] = True
    return found
