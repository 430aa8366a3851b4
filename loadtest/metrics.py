"""The figures of a run, and of several repetitions of it.

They are over all requests of the run, from the first that was sent to the end of the last: the set of requests is fixed
and the same for all that are compared, so that neither the time in which a batch fills nor that in which it drains is
cut away (it is a part of what a policy costs).  What warms the server is sent before, and is no part of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise, zip_longest
from statistics import median
from typing import Any, TypeVar, cast

import numpy as np

from shoal.loadtest.fairness import fairness
from shoal.loadtest.records import RequestRecord, Run
from shoal.loadtest.steps import Step

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must keep to count for goodput; seconds.  TPOT is no matter to an answer of one token."""

    ttft: float = 1.0
    tpot: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of a latency, in seconds; between two measurements they are interpolated."""

    p50: float
    p90: float
    p99: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What some of the requests got: one client's, or those of one priority.

    Attributes:
        num_requests: that were answered.
        throughput: output tokens/s, over the whole run.
    """

    num_requests: int
    throughput: float
    ttft: Quantiles | None
    tpot: Quantiles | None
    e2e: Quantiles | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSummary:
    """What the engine's steps say; means and shares are over the time of the steps.

    Attributes:
        num_steps, step_seconds: how many, and how long they were on average.
        tokens_per_step: scheduled tokens, those of padding rows too.
        batch_size: rows that did work.
        batch_sizes: share of the time in which 0, 1, 2, ... rows did work.
        padding_rows: rows that were computed for requests that had ended.
        padding_share: of all rows.
        kv_usage, kv_usage_peak: share of all blocks of the KV cache that requests own.
        kv_utilisation: share of the slots of those blocks in which keys and values stand.
        kv_waste: slots in which none do, in blocks for each row.
        num_preemptions: in all.
    """

    num_steps: int
    step_seconds: float
    tokens_per_step: float
    batch_size: float
    batch_sizes: tuple[float, ...]
    padding_rows: float
    padding_share: float
    kv_usage: float
    kv_usage_peak: float
    kv_utilisation: float
    kv_waste: float
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of a run.  None stands for what there is no measurement of.

    Attributes:
        num_requests, num_errors: that were sent, and those of them that were not answered whole; latencies and tokens
            are those of the others.
        seconds: from the first request that was sent to the end of the last.
        throughput: output tokens/s.
        request_rate: answers/s.
        goodput, goodput_share: answers/s that kept the objectives for TTFT and TPOT, and their share of all requests
            (Zhong et al. 2024, "DistServe").
        ttft: from sending to the first token.
        itl: between events of a stream that carry text; tokens that were accepted together come in one.
        tpot: of each request, the mean time for each token after the first.
        e2e: from sending to the end of the stream.
        queueing: in the engine, from arrival to the first step.
        num_cached_tokens, cached_share: prompt tokens that were found in the prefix cache, and their share.
        acceptance_rate: accepted of all drafted tokens.
        jain: see `loadtest/fairness.py`.
        clients, priorities: the same latencies for each, where there are several.
        generator_cores: share of a core that the load generator used.
        generator_cores_per_1000: the same for each 1,000 output tokens/s.
        api_cores, engine_cores: what the server's two processes used.
        engine: None without a trace.
    """

    num_requests: int
    num_errors: int
    num_prompt_tokens: int
    num_output_tokens: int
    seconds: float
    throughput: float
    request_rate: float
    goodput: float
    goodput_share: float
    ttft: Quantiles | None
    itl: Quantiles | None
    tpot: Quantiles | None
    e2e: Quantiles | None
    queueing: Quantiles | None
    num_cached_tokens: int
    cached_share: float | None
    acceptance_rate: float | None
    jain: float | None
    clients: dict[str, Group]
    priorities: dict[int, Group]
    generator_cores: float | None
    generator_cores_per_1000: float | None
    api_cores: float | None
    engine_cores: float | None
    engine: EngineSummary | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """Repetitions of a run: of each figure by itself the median, the least and the most."""

    num_runs: int
    median: Summary
    least: Summary
    most: Summary


def summarize(run: Run, slo: Slo = Slo()) -> Summary:
    """The figures of a run, whole or broken off."""
    answered = [record for record in run.requests if is_answered(record)]
    begin = min((record.sent_at for record in run.requests), default=0.0)
    end = max(map(_last_seen, run.requests), default=begin)
    seconds = end - begin
    num_output_tokens = sum(record.num_output_tokens for record in answered)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in answered)
    num_cached_tokens = sum(record.num_cached_tokens for record in answered)
    num_accepted = sum(record.num_accepted_tokens for record in answered)
    num_drafted = num_accepted + sum(record.num_rejected_tokens for record in answered)
    num_good = sum(_keeps(record, slo) for record in answered)
    return Summary(
        num_requests=len(run.requests),
        num_errors=len(run.requests) - len(answered),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        seconds=seconds,
        throughput=ratio(num_output_tokens, seconds) or 0.0,
        request_rate=ratio(len(answered), seconds) or 0.0,
        goodput=ratio(num_good, seconds) or 0.0,
        goodput_share=ratio(num_good, len(run.requests)) or 0.0,
        ttft=quantiles(map(ttft, answered)),
        itl=quantiles(gap for record in answered for gap in itl(record)),
        tpot=quantiles(map(tpot, answered)),
        e2e=quantiles(map(e2e, answered)),
        queueing=quantiles(
            request.joined_at - request.arrived_at
            for request in run.engine_requests.values()
            if request.joined_at is not None
        ),
        num_cached_tokens=num_cached_tokens,
        cached_share=ratio(num_cached_tokens, num_prompt_tokens),
        acceptance_rate=ratio(num_accepted, num_drafted),
        jain=fairness(run.requests, end),
        clients=_groups(answered, seconds, lambda record: record.client),
        priorities=_groups(answered, seconds, lambda record: record.priority),
        generator_cores=_cores(run.generator_cpu_seconds, seconds),
        generator_cores_per_1000=_cores(run.generator_cpu_seconds, num_output_tokens / 1000),
        api_cores=_cores(run.api_cpu_seconds, seconds),
        engine_cores=_cores(run.engine_cpu_seconds, seconds),
        engine=_summarize_steps(run.steps, run.block_size),
    )


def combine(summaries: Sequence[Summary]) -> Combined:
    """The figures of at least one repetition together; what some of them lack is that of the others."""
    return Combined(
        num_runs=len(summaries),
        median=_fold(summaries, median),
        least=_fold(summaries, min),
        most=_fold(summaries, max),
    )


# -- one request -------------------------------------------------------------------------------------------------------


def is_answered(record: RequestRecord) -> bool:
    """Whether the answer came, and came whole."""
    return record.error is None and record.finished_at is not None


def ttft(record: RequestRecord) -> float | None:
    return record.token_times[0] - record.sent_at if record.token_times else None


def itl(record: RequestRecord) -> list[float]:
    return [after - before for before, after in pairwise(record.token_times)]


def tpot(record: RequestRecord) -> float | None:
    if record.num_output_tokens < 2 or not record.token_times:
        return None
    return (record.token_times[-1] - record.token_times[0]) / (record.num_output_tokens - 1)


def e2e(record: RequestRecord) -> float | None:
    return None if record.finished_at is None else record.finished_at - record.sent_at


def _keeps(record: RequestRecord, slo: Slo) -> bool:
    first, further = ttft(record), tpot(record)
    return first is not None and first <= slo.ttft and (further is None or further <= slo.tpot)


def _last_seen(record: RequestRecord) -> float:
    return max(record.sent_at, record.finished_at or 0.0, *record.token_times[-1:])


# -- many --------------------------------------------------------------------------------------------------------------


def quantiles(values: Iterable[float | None]) -> Quantiles | None:
    """None if there are no values; None among the values is passed over."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    p50, p90, p99 = np.quantile(known, (0.5, 0.9, 0.99)).tolist()
    return Quantiles(p50=p50, p90=p90, p99=p99, mean=float(np.mean(known)))


def ratio(part: float, whole: float) -> float | None:
    """None where there is no whole."""
    return part / whole if whole else None


def _cores(cpu_seconds: float, seconds: float) -> float | None:
    """None where no processor time was measured, as in a simulation."""
    return ratio(cpu_seconds, seconds) if cpu_seconds else None


def _groups(records: Iterable[RequestRecord], seconds: float, key: Callable[[RequestRecord], Key]) -> dict[Key, Group]:
    groups: defaultdict[Key, list[RequestRecord]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    if len(groups) < 2:
        return {}
    return {
        name: Group(
            num_requests=len(own),
            throughput=ratio(sum(record.num_output_tokens for record in own), seconds) or 0.0,
            ttft=quantiles(map(ttft, own)),
            tpot=quantiles(map(tpot, own)),
            e2e=quantiles(map(e2e, own)),
        )
        for name, own in sorted(groups.items(), key=lambda item: str(item[0]))
    }


def _summarize_steps(steps: Sequence[Step], block_size: int) -> EngineSummary | None:
    seconds = np.array([step.seconds for step in steps])
    if not seconds.sum():
        return None

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=seconds))

    padding = [sum(row.is_padding for row in step.rows) for step in steps]
    working = [len(step.rows) - padded for step, padded in zip(steps, padding, strict=True)]
    used_slots = mean([step.num_used_blocks * block_size for step in steps])
    free_slots = used_slots - mean([step.num_kv_tokens for step in steps])
    num_rows = mean(working) + mean(padding)
    return EngineSummary(
        num_steps=len(steps),
        step_seconds=float(seconds.mean()),
        tokens_per_step=mean([sum(row.num_tokens for row in step.rows) for step in steps]),
        batch_size=mean(working),
        batch_sizes=tuple((np.bincount(working, weights=seconds) / seconds.sum()).tolist()),
        padding_rows=mean(padding),
        padding_share=ratio(mean(padding), num_rows) or 0.0,
        kv_usage=mean([ratio(step.num_used_blocks, step.num_blocks) or 0.0 for step in steps]),
        kv_usage_peak=max(ratio(step.num_used_blocks, step.num_blocks) or 0.0 for step in steps),
        kv_utilisation=1 - (ratio(free_slots, used_slots) or 0.0),
        kv_waste=ratio(free_slots / block_size, num_rows) or 0.0,
        num_preemptions=sum(step.num_preemptions for step in steps),
    )


def _fold(values: Sequence[T], function: Callable[[list[Any]], Any]) -> T:
    """One value of several alike: dataclasses by field, dictionaries by key, tuples by place, numbers by `function`."""
    known: list[Any] = [value for value in values if value is not None]
    if not known:
        return values[0]
    result: Any
    first: Any = known[0]
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        result = replace(first, **{name: _fold([getattr(value, name) for value in known], function) for name in names})
    elif isinstance(first, dict):
        names = list(dict.fromkeys(name for value in known for name in value))
        result = {name: _fold([value[name] for value in known if name in value], function) for name in names}
    elif isinstance(first, tuple):
        result = tuple(_fold(place, function) for place in zip_longest(*known, fillvalue=0.0))
    else:
        result = function(known)
    return cast(T, result)
