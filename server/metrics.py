"""Prometheus metrics, under vLLM's names, so that dashboards made for it work."""

from __future__ import annotations

import asyncio
from itertools import zip_longest
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shoal.scheduler.output import RequestOutput, SchedulerStats
from shoal.server.engine.journal import Journal

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_LABELS = ("model_name", "engine")

_GAUGES = {
    "num_requests_running": "Requests in the batch.",
    "num_requests_waiting": "Requests that wait.",
    "kv_cache_usage_perc": "Share of the KV cache's blocks in use, 0 to 1.",
}
_COUNTERS = {
    "num_preemptions": "Preemptions.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found in the prefix cache.",
    "spec_decode_num_drafts": "Proposals of drafted tokens that were verified.",
    "spec_decode_num_draft_tokens": "Drafted tokens.",
    "spec_decode_num_accepted_tokens": "Drafted tokens that were accepted.",
    "prompt_tokens": "Prompt tokens processed.",
    "generation_tokens": "Tokens generated.",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Arrival to first token.", _SECONDS),
    "inter_token_latency_seconds": ("Token to token.", _TOKEN_SECONDS),
    "request_time_per_output_token_seconds": ("Mean time per token after the first.", _TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("Arrival to last token.", _SECONDS),
    "request_queue_time_seconds": ("Arrival to first step.", _SECONDS),
    "request_prefill_time_seconds": ("First step to first token.", _SECONDS),
    "request_inference_time_seconds": ("First step to last token.", _SECONDS),
    "request_decode_time_seconds": ("First token to last token.", _SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Tokens generated in a request.", _TOKENS),
}
_RESTARTS = {
    "engine_restarts": "Engines that took the place of one that died or hung.",
    "requests_resumed": "Requests that went on in another engine.",
    "engine_pause_seconds": "Seconds without an engine after one died.",
}
# Counters that the scheduler keeps, by its own names for them.
_COUNTED = {
    "num_preemptions": "num_preemptions",
    "num_prefix_queries": "prefix_cache_queries",
    "num_prefix_hits": "prefix_cache_hits",
    "num_drafts": "spec_decode_num_drafts",
    "num_draft_tokens": "spec_decode_num_draft_tokens",
}


class Metrics:
    """What the server counts and times, all seen from the API process.

    Args:
        model_name: a label of every series; the other is the name of the engine.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._model_name = model_name
        self._families: dict[str, Any] = {
            **{name: Gauge(f"vllm:{name}", text, _LABELS, registry=registry) for name, text in _GAUGES.items()},
            **{name: Counter(f"vllm:{name}", text, _LABELS, registry=registry) for name, text in _COUNTERS.items()},
            **{
                name: Histogram(f"vllm:{name}", text, _LABELS, registry=registry, buckets=buckets)
                for name, (text, buckets) in _HISTOGRAMS.items()
            },
        }
        self._accepted_per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were accepted, by their place in the proposal.",
            (*_LABELS, "position"),
            registry=registry,
        )
        self._success = Counter(
            "vllm:request_success", "Requests that ended, by reason.", (*_LABELS, "finished_reason"), registry=registry
        )
        self._refused = Counter(
            "shoal:requests_refused",
            "POST requests answered with an error in place of a result, by its code.",
            ("model_name", "code"),
            registry=registry,
        )
        self._restarts, self._resumed, self._paused = (
            Counter(f"shoal:{name}", text, _LABELS, registry=registry) for name, text in _RESTARTS.items()
        )
        tasks = Gauge("shoal:api_tasks", "Tasks of the API process's event loop.", ("model_name",), registry=registry)
        tasks.labels(model_name).set_function(_num_tasks)
        self._batch_lines = Counter(
            "shoal:batch_lines", "Lines of batches that were answered.", ("model_name", "result"), registry=registry
        )
        self._series: dict[str, dict[str, Any]] = {}
        self._counted: dict[str, SchedulerStats] = {}

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def stats(self, engine: str, stats: SchedulerStats) -> None:
        """Take in the scheduler's snapshot after a step of this engine."""
        series = self._of(engine)
        before = self._counted.get(engine) or SchedulerStats(0, 0, 0.0, 0, 0, 0)
        self._counted[engine] = stats
        series["num_requests_running"].set(stats.num_running)
        series["num_requests_waiting"].set(stats.num_waiting)
        series["kv_cache_usage_perc"].set(stats.kv_cache_usage)
        for field, name in _COUNTED.items():
            # When an engine dies the client reports zeros, from which the next one counts again.
            series[name].inc(max(getattr(stats, field) - getattr(before, field), 0))
        pairs = zip_longest(stats.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, fillvalue=0)
        for position, (now, then) in enumerate(pairs):
            if now > then:
                series["spec_decode_num_accepted_tokens"].inc(now - then)
                self._accepted_per_pos.labels(self._model_name, engine, str(position)).inc(now - then)

    def restarted(self, engine: str, num_resumed: int, seconds: float) -> None:
        """Take in that an engine was replaced: how many requests went on in the new one, after how long a pause."""
        for counter, value in ((self._restarts, 1), (self._resumed, num_resumed), (self._paused, seconds)):
            counter.labels(self._model_name, engine).inc(value)

    def refused(self, code: str | None) -> None:
        """Take in that a request was answered with an error of this code."""
        self._refused.labels(self._model_name, str(code)).inc()

    def tokens(self, journal: Journal, output: RequestOutput, now: float) -> None:
        """Take in a request's news, before its journal does; `now` is on the clock of the journal."""
        if not output.token_ids:
            return
        series = self._of(journal.engine)
        series["generation_tokens"].inc(len(output.token_ids))
        if journal.last_token_time is None:
            elapsed = now - journal.arrival_time
            series["time_to_first_token_seconds"].observe(elapsed)
            series["request_queue_time_seconds"].observe(output.queue_time)
            series["request_prefill_time_seconds"].observe(max(elapsed - output.queue_time, 0.0))
            series["prompt_tokens"].inc(len(journal.request.prompt_token_ids))
        else:
            # Tokens that come together share the time since the last ones.
            each = (now - journal.last_token_time) / len(output.token_ids)
            series["inter_token_latency_seconds"].observe(each)

    def finished(self, journal: Journal, reason: str, now: float) -> None:
        """Take in the end of a request, for whatever reason; `now` is on the clock of the journal."""
        series = self._of(journal.engine)
        self._success.labels(self._model_name, journal.engine, reason).inc()
        num_prompt_tokens, num_tokens = len(journal.request.prompt_token_ids), len(journal.output_token_ids)
        if reason == "length" and not num_tokens:  # its prompt was scored, and nothing asked for after it
            series["prompt_tokens"].inc(num_prompt_tokens)
        series["e2e_request_latency_seconds"].observe(now - journal.arrival_time)
        series["request_prompt_tokens"].observe(num_prompt_tokens)
        series["request_generation_tokens"].observe(num_tokens)
        if journal.first_token_time is not None and journal.last_token_time is not None:
            decode = journal.last_token_time - journal.first_token_time
            inference = journal.last_token_time - journal.arrival_time - journal.queue_time
            series["request_decode_time_seconds"].observe(decode)
            series["request_inference_time_seconds"].observe(inference)
            if num_tokens > 1:
                series["request_time_per_output_token_seconds"].observe(decode / (num_tokens - 1))

    def batch_line(self, result: Literal["completed", "failed"]) -> None:
        """Take in that a line of a batch was answered."""
        self._batch_lines.labels(self._model_name, result).inc()

    def totals(self) -> dict[str, float]:
        """The sum of each gauge and counter over the engines."""
        return {
            name: sum(series[name]._value.get() for series in self._series.values()) for name in (*_GAUGES, *_COUNTERS)
        }

    def _of(self, engine: str) -> dict[str, Any]:
        """The series of an engine."""
        if engine not in self._series:
            labels = self._model_name, engine
            self._series[engine] = {name: family.labels(*labels) for name, family in self._families.items()}
        return self._series[engine]


def _num_tasks() -> int:
    """Tasks of the running event loop; 0 outside of one."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0
