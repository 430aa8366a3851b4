"""One request of a trace: how it was served, and what the twin says of it under other policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from zlib import crc32

from msgspec import Struct

from shoal.loadtest.costs import fit
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, Run, Setup
from shoal.loadtest.replica import output_token
from shoal.loadtest.trace import Trace, stays
from shoal.loadtest.twin import simulate
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.explanation import Explanation, RequestHistory
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.step_record import AskedRecord, StepRecord

SLOWEST = "slowest"
MAX_REQUESTS = 2000  # that the twin plays, those around the one that is explained
MAX_FITTED = 20_000  # steps that its costs are fitted to
MAX_NAMED = 5


class Counterfactual(Struct, frozen=True):
    """What the twin says of a request under another policy.

    Attributes:
        total_ms: from its arrival to its last token; None if it would have been refused.
    """

    policy: str
    total_ms: float | None


class Explained(Struct, frozen=True, kw_only=True):
    """What a trace says of a request.

    Attributes:
        policy: that the engine had; empty if the trace does not say.
        simulated_ms: what the twin says of the request under that policy: how far it is from `timing.total_ms` is how
            far to trust the rest.
        others: policies.
        why_not: why there is nothing of the twin; empty if there is.
        num_requests, num_simulated: of the trace, and of those the ones that the twin played.
    """

    timing: Explanation
    policy: str = ""
    simulated_ms: float | None = None
    others: list[Counterfactual] = []
    why_not: str = ""
    num_requests: int
    num_simulated: int = 0


def explain(trace: Trace, asked_for: str, policies: Sequence[str] = ()) -> Explained:
    """Explain a request.

    Args:
        asked_for: the id of the request, or the beginning of it; or `SLOWEST`.
        policies: to compare with; all others if none is named.

    Raises:
        ConfigError: there is no such policy.
        LoadTestError: there is no such request, or several.
    """
    request_id = find_request(trace.steps, asked_for)
    history = RequestHistory(request_id)
    for step in trace.steps:
        history(step)
    timing = history.explanation()
    assert timing is not None, "it has a step"
    explained = Explained(timing=timing, num_requests=len(stays(trace.steps)))
    try:
        return _with_twin(explained, trace, policies)
    except LoadTestError as error:
        policy = trace.server.settings["scheduler"]["policy"] if trace.server else ""
        return Explained(timing=timing, policy=policy, why_not=str(error), num_requests=explained.num_requests)


def find_request(steps: Sequence[StepRecord], asked_for: str) -> str:
    """The id of the request that is asked for; raises LoadTestError if there is none, or no single one."""
    found = stays(steps)
    if not found:
        raise LoadTestError("the trace has no request that ever joined a batch")
    if asked_for == SLOWEST:
        ended_at = {
            share.request_id: step.start + step.seconds
            for step in steps
            for share in step.shares
            if not share.is_padding and share.request_id in found
        }
        return max(ended_at, key=lambda request_id: ended_at[request_id] - found[request_id].arrived_at)
    if asked_for in found:
        return asked_for
    matching = [request_id for request_id in found if request_id.startswith(asked_for)]
    if not matching:
        raise LoadTestError(f"the trace has {len(found)} requests, and the id of none begins with {asked_for[:64]!r}")
    if len(matching) > 1:
        more = ", ..." if len(matching) > MAX_NAMED else ""
        raise LoadTestError(
            f"{len(matching)} requests begin with {asked_for[:64]!r}: {', '.join(matching[:MAX_NAMED])}{more}"
        )
    return matching[0]


def recorded_requests(steps: Sequence[StepRecord], around: str) -> list[WorkloadRequest]:
    """The requests of a trace as a workload that the twin can play, in the order in which they first joined the batch.

    Lengths, arrivals and what policies may know are those of the trace.  Its tokens are not known: a request that
    found a prefix in the cache gets that of the request before it whose text is long enough.

    Args:
        around: of more than `MAX_REQUESTS` requests, those that arrived before and after this one are taken.

    Raises:
        LoadTestError: the trace does not say what was asked for.
    """
    asked: dict[str, AskedRecord] = {}
    num_cached, num_outputs = dict[str, int](), Counter[str]()
    for step in steps:
        for request_id, one in step.asked.items():
            asked.setdefault(request_id, one)
        for share in step.shares:
            num_cached.setdefault(share.request_id, share.num_computed_tokens)
            if share.samples and not share.is_padding:
                num_outputs[share.request_id] += 1 + step.accepted.get(share.request_id, 0)
    if around not in asked:
        raise LoadTestError("the trace does not say what the request asked for, as those of an older Shoal")
    found = {request_id: stay for request_id, stay in stays(steps).items() if request_id in asked}
    chosen = _around(sorted(found, key=lambda one: found[one].arrived_at), around)
    first = found[chosen[0]].arrived_at
    texts: list[list[int]] = []
    requests: list[WorkloadRequest] = []
    for request_id in sorted(chosen, key=lambda one: found[one].joined_at):
        one, count = asked[request_id], max(num_outputs[request_id], 1)
        cached = min(num_cached[request_id], one.num_prompt_tokens)
        known = next((text[:cached] for text in reversed(texts) if len(text) >= cached), [])
        prompt = known + [_prompt_token(request_id, place) for place in range(len(known), one.num_prompt_tokens)]
        texts.append(prompt + [output_token(request_id, place) for place in range(count - 1)])
        requests.append(
            WorkloadRequest(
                request_id=request_id,
                session=request_id,
                client=one.scheduling.client,
                prompt="recorded",
                prompt_token_ids=prompt,
                num_output_tokens=count,
                max_tokens=max(one.max_tokens, count),
                priority=one.scheduling.priority,
                ttft_slo_ms=one.scheduling.ttft_slo_ms,
                tpot_slo_ms=one.scheduling.tpot_slo_ms,
                arrival_time=found[request_id].arrived_at - first,
            )
        )
    return requests


def described(explained: Explained) -> Iterator[str]:
    """What is known, in lines for people."""
    timing = explained.timing
    yield f"{timing.request_id}: {timing.total_ms:,.1f} ms from its arrival to its last step"
    yield _row("queued", timing.queued_ms)
    chunks = ", ".join(f"{one.num_tokens:,} tokens in {one.ms:,.1f} ms" for one in timing.prefill_chunks[:MAX_NAMED])
    more = ", ..." if timing.num_prefill_chunks > MAX_NAMED else ""
    cached = f"; {timing.num_cached_tokens:,} tokens found in the prefix cache" if timing.num_cached_tokens else ""
    yield _row("prefill", timing.prefill_ms, f"{_count(timing.num_prefill_chunks, 'chunk')}: {chunks}{more}{cached}")
    if timing.median_decode_ms is not None:
        steps = f"{_count(timing.num_decode_steps, 'step')}, median {timing.median_decode_ms:,.1f} ms"
        tokens = f"longest {timing.longest_decode_ms:,.1f} ms; {timing.num_output_tokens:,} tokens"
        yield _row("decode", timing.decode_ms, f"{steps}, {tokens}")
    if timing.num_preemptions:
        by = ", ".join(
            ("for want of blocks" if one.by is None else f"by {one.by}")
            + (f" for {one.ms:,.1f} ms" if one.ms is not None else "")
            for one in timing.preemptions[:MAX_NAMED]
        )
        yield _row("preempted", timing.preempted_ms, f"{_count(timing.num_preemptions, 'time')}: {by}")
    yield _row("other", timing.other_ms, "between its steps")
    beside = ", ".join(f"{one.request_id} in {one.num_steps:,}" for one in timing.companions[:MAX_NAMED])
    most = f"; most often {beside}" if beside else ""
    yield f"  steps of {timing.mean_batch:,.1f} requests on average, {timing.max_batch:,} at most{most}"
    if timing.num_drafted_tokens:
        yield f"  {timing.num_accepted_tokens:,} of {timing.num_drafted_tokens:,} drafted tokens were accepted"
    if explained.why_not:
        yield f"No comparison with other policies: {explained.why_not}"
        return
    if explained.num_simulated < explained.num_requests:
        yield f"The twin played {explained.num_simulated:,} of {explained.num_requests:,} requests, those around it."
    yield (
        f"The twin says {_shown(explained.simulated_ms)} under {explained.policy} for what was measured as "
        f"{timing.total_ms:,.0f} ms, and of the same requests:"
    )
    for other in explained.others:
        yield f"  under {other.policy}: {_shown(other.total_ms)} instead of {timing.total_ms:,.0f}"


def _row(name: str, ms: float, what: str = "") -> str:
    return f"  {name:<10}{ms:>12,.1f} ms  {what}".rstrip()


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _shown(ms: float | None) -> str:
    return "refused" if ms is None else f"{ms:,.0f} ms"


def _with_twin(explained: Explained, trace: Trace, policies: Sequence[str]) -> Explained:
    """Add what the twin says; raises LoadTestError if it can say nothing."""
    server, request_id = trace.server, explained.timing.request_id
    if server is None:
        raise LoadTestError("the trace does not say what engine wrote it, as those of an older Shoal")
    policy = server.settings["scheduler"]["policy"]
    is_speculating = server.settings.get("speculation", {}).get("method", "off") != "off"
    if is_speculating or any(share.num_spec_tokens for step in trace.steps for share in step.shares):
        raise LoadTestError("the engine speculated, and nobody knows what would have been accepted")
    requests = recorded_requests(trace.steps, request_id)
    played = {request.request_id for request in requests}
    steps = [step for step in trace.steps if any(share.request_id in played for share in step.shares)]
    costs = fit([Run(setup=Setup(policy=policy), workload="", load=Load(), server=server, steps=steps[:MAX_FITTED])])

    def total_ms(name: str) -> float | None:
        planned = PlannedRun(setup=Setup(policy=name), workload="", load=Load())
        run = simulate(planned, requests, server=server, costs=costs)
        record = next(record for record in run.requests if record.request_id == request_id)
        if record.finished_at is None or record.error is not None:
            return None
        return round((record.finished_at - record.sent_at) * 1000, 3)

    others = policies or [name for name in POLICIES if name != policy]
    return Explained(
        timing=explained.timing,
        policy=policy,
        simulated_ms=total_ms(policy),
        others=[Counterfactual(name, total_ms(name)) for name in others],
        num_requests=explained.num_requests,
        num_simulated=len(requests),
    )


def _around(request_ids: Sequence[str], request_id: str) -> Sequence[str]:
    """At most `MAX_REQUESTS` of the ids, with this one as far in the middle as may be."""
    begin = max(min(request_ids.index(request_id) - MAX_REQUESTS // 2, len(request_ids) - MAX_REQUESTS), 0)
    return request_ids[begin : begin + MAX_REQUESTS]


def _prompt_token(request_id: str, place: int) -> int:
    return crc32(f"{request_id} prompt {place}".encode()) >> 1
