"""Fits what a request and its tokens wait for outside the engine.

Each latency is read off where nothing else is in the way, as far as there are such places: the queue of the API process
is what the simulator makes of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shoal.loadtest.costs import Latencies
from shoal.loadtest.records import RequestRecord, Run
from shoal.loadtest.regression import fit_robustly
from shoal.loadtest.steps import EngineRequest, Step
from shoal.scheduler.policies import Policy, find_policy

_MIN_PAIRS = 5


def fit_latencies(runs: Sequence[Run], arrival_gap: float) -> Latencies:
    """The typical latencies of these runs; 0 for those that none of the requests shows.

    Args:
        arrival_gap: seconds of the engine's work on a request that comes, before the step.
    """
    request, prompt_token = _fit_handling(runs)
    token, delivery = _fit_delivery(runs)
    whole = [record for run in runs for record in run.requests if _is_whole(record)]
    send = _typical(_sendings((run for run in runs if run.load.users), request, prompt_token))
    late = _typical(_sendings((run for run in runs if not run.load.users), request, prompt_token))
    return Latencies(
        lateness=max(late - send, 0.0),
        send=send,
        request=request,
        prompt_token=prompt_token,
        command=_typical(wait - arrival_gap for run in runs for wait in _commands(run)),
        token=token,
        delivery=delivery,
        end=_typical(record.finished_at - record.token_times[-1] for record in whole if record.finished_at is not None),
        turnaround=_typical(wait for run in runs for wait in _turnarounds(run)),
    )


def _typical(values: Iterable[float]) -> float:
    known = list(values)
    return max(float(np.median(known)), 0.0) if known else 0.0


def _is_whole(record: RequestRecord) -> bool:
    return record.error is None and record.finished_at is not None and bool(record.token_times)


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """How a request came to the API process: seconds after the start, and the tokens of its prompt."""

    sent_at: float
    arrived_at: float
    num_prompt_tokens: int


def _entries(run: Run) -> list[_Entry]:
    """In the order in which the API process took them."""
    known = [
        _Entry(record.sent_at, run.engine_requests[record.server_id].arrived_at, record.num_prompt_tokens)
        for record in run.requests
        if record.server_id in run.engine_requests
    ]
    return sorted(known, key=lambda entry: entry.arrived_at)


def _fit_handling(runs: Sequence[Run]) -> tuple[float, float]:
    """The API process's work on a request and on a token of its prompt: the time between two that came together."""
    pairs = [pair for run in runs for pair in _queued(run)]
    if len(pairs) < _MIN_PAIRS:  # nothing tells work from waiting, then
        pairs = [(entry.num_prompt_tokens, entry.arrived_at - entry.sent_at) for run in runs for entry in _entries(run)]
    if not pairs:
        return 0.0, 0.0
    table = np.array(pairs, dtype=float)
    constant, per_token = fit_robustly(np.column_stack([np.ones(len(table)), table[:, 0]]), table[:, 1]).tolist()
    return constant, per_token


def _queued(run: Run) -> Iterator[tuple[int, float]]:
    """Prompt tokens of requests that queued behind the one before, and the seconds by which they arrived after it.

    They were sent well before that one had been taken, and no step ended meanwhile, whose tokens would have been in
    the way.
    """
    ends = [step.start + step.seconds for step in run.steps]
    for before, after in pairwise(_entries(run)):
        if after.sent_at <= before.sent_at + (before.arrived_at - before.sent_at) / 2 and not _is_any(
            ends, before.sent_at, after.arrived_at
        ):
            yield after.num_prompt_tokens, after.arrived_at - before.arrived_at


def _sendings(runs: Iterable[Run], request: float, prompt_token: float) -> Iterator[float]:
    """How much longer than the API process's work it took until requests had arrived that nothing was in the way of."""
    for run in runs:
        ends = [step.start + step.seconds for step in run.steps]
        entries, last = _entries(run), float("-inf")
        for entry in entries:
            if last <= entry.sent_at and not _is_any(ends, entry.sent_at, entry.arrived_at):
                yield entry.arrived_at - entry.sent_at - request - prompt_token * entry.num_prompt_tokens
            last = entry.arrived_at


def _commands(run: Run) -> Iterator[float]:
    """From the API process to the engine, of requests that found it idle, and a policy that lets nobody wait then."""
    if find_policy(run.setup.policy).wake_time is not Policy.wake_time:
        return
    starts = [step.start for step in run.steps]
    for request in run.engine_requests.values():
        before = bisect_right(starts, request.arrived_at) - 1
        if request.joined_at is not None and (before < 0 or _is_idle(run.steps, before, request)):
            yield request.joined_at - request.arrived_at


def _is_idle(steps: Sequence[Step], before: int, request: EngineRequest) -> bool:
    """Whether the step before had ended when the request arrived, and the next one is the request's first."""
    last = steps[before]
    if last.start + last.seconds > request.arrived_at or before + 1 == len(steps):
        return False
    return steps[before + 1].start == request.joined_at and len(steps[before + 1].rows) == 1


def _is_any(times: Sequence[float], since: float, until: float) -> bool:
    return bisect_left(times, since) < bisect_right(times, until)


# -- tokens and ends ---------------------------------------------------------------------------------------------------


def _fit_delivery(runs: Sequence[Run]) -> tuple[float, float]:
    """The work on each token of a step, and the time until the first of them is there beside that."""
    messages = [message for run in runs for message in _messages(run)]
    spreads = [(len(times) - 1, times[-1] - times[0]) for _, times in messages if len(times) > 1]
    token = 0.0
    if spreads:
        table = np.array(spreads, dtype=float)
        token = float(fit_robustly(table[:, :1], table[:, 1])[0])
    first = [(end, times[0] - end - token) for end, times in messages]
    likely = float(np.median([wait for _, wait in first])) if first else 0.0
    # Those that the tokens of the step before were in the way of say nothing.
    free = [
        wait
        for (_, before), (end, wait) in zip([(0.0, [-1.0]), *messages], first, strict=False)
        if before[-1] - likely <= end or before[-1] > end + 60
    ]
    return token, max(float(np.median(free)), 0.0) if free else max(likely, 0.0)


def _messages(run: Run) -> Iterator[tuple[float, list[float]]]:
    """The end of each step, and when its tokens were there, ascending.

    A token is told from the others by its place among the request's; so only requests that have an event for each
    token, which an incomplete character may lack, are looked at.
    """
    times = {
        record.server_id: record.token_times
        for record in run.requests
        if _is_whole(record) and len(record.token_times) == record.num_output_tokens
    }
    num_seen = dict.fromkeys(times, 0)
    for step in run.steps:
        seen: list[float] = []
        for row in step.rows:
            if row.samples and not row.is_padding and row.request_id in times:
                place = num_seen[row.request_id]
                num_seen[row.request_id] += 1
                if place < len(times[row.request_id]):
                    seen.append(times[row.request_id][place])
        if seen:
            yield step.start + step.seconds, sorted(seen)


def _turnarounds(run: Run) -> Iterator[float]:
    """From each answer's end to the next request, in a closed loop whose users do not think."""
    ends = sorted(record.finished_at for record in run.requests if record.finished_at is not None)
    if run.load.users and not run.load.think_seconds and len(ends) == len(run.requests):
        sent = sorted(record.sent_at for record in run.requests)
        for end, begin in zip(ends, sent[run.load.users :], strict=False):
            yield begin - end
