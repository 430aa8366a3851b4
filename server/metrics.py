"""Prometheus metrics, under vLLM's names, so that dashboards made for it work.

Each series is there from the start, at zero, so that no rate misses its first event.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from shoal.scheduler.errors import QueueFullError, ShoalError
from shoal.scheduler.output import RequestOutput, SchedulerStats
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import Ready
from shoal.server.errors import CODES, RateLimitError, http_error

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
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
    "prompt_tokens_cached": "Prompt tokens found in the prefix cache when a request was first admitted.",
    "generation_tokens": "Tokens generated.",
}
# Of what a server of texts alone, with one cache, has not.
_ALWAYS_ZERO = {
    "external_prefix_cache_queries": "Always 0: there is no cache shared among servers.",
    "external_prefix_cache_hits": "Always 0: there is no cache shared among servers.",
    "mm_cache_queries": "Always 0: requests hold texts only.",
    "mm_cache_hits": "Always 0: requests hold texts only.",
    "prompt_tokens_recomputed": "Always 0: what is found in the prefix cache is not computed again.",
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
    "request_prefill_kv_computed_tokens": ("Prompt tokens of a request that were computed, not found.", _TOKENS),
    "request_generation_tokens": ("Tokens generated in a request.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens generated in the longest choice of a prompt.", _TOKENS),
    "request_params_n": ("Choices of a prompt.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("max_tokens of a request.", _TOKENS),
    "request_num_preemptions": ("Preemptions of a request.", (0, 1, 2, 3, 4, 5, 10, 20)),
    "iteration_tokens_total": ("Tokens computed in a step.", _STEP_TOKENS),
}
# Families with one label more, and its values.
_LABELLED: dict[str, tuple[type[Gauge] | type[Counter], str, str, tuple[str, ...]]] = {
    "num_requests_waiting_by_reason": (
        Gauge,
        "Requests that wait for room, and those that the policy holds back.",
        "reason",
        ("capacity", "deferred"),
    ),
    "engine_sleep_state": (
        Gauge,
        "1 for awake while there is an engine; it never sleeps.",
        "sleep_state",
        ("awake", "weights_offloaded", "discard_all"),
    ),
    "prompt_tokens_by_source": (
        Counter,
        "Prompt tokens that were computed, and that were found in the prefix cache.",
        "source",
        ("local_compute", "local_cache_hit", "external_kv_transfer"),
    ),
    "prompt_tokens_cached_by_source": (
        Counter,
        "Prompt tokens found in the prefix cache, by where it is: with the device that computes.",
        "source",
        ("device", "host", "disk", "p2p", "external_unspecified"),
    ),
    "request_success": (
        Counter,
        "Requests that ended, by reason.",
        "finished_reason",
        ("stop", "length", "abort", "error"),
    ),
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
# Settings beyond which a request is refused for now.
_LIMITS = (
    *("max_num_waiting", "max_queue_seconds", "max_queue_tokens", "timeout"),
    *("key_max_requests", "key_requests_per_minute", "key_tokens_per_minute"),
)
_CACHE_CONFIG = (
    *("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "prefix_caching_hash_algo"),
    "kv_cache_memory_bytes",
)
NO_STATS = SchedulerStats(0, 0, 0.0, 0, 0, 0)  # of an engine that has just started, or is no more


class Metrics:
    """What the server counts and times, all seen from the API process.

    Args:
        model_name: a label of nearly every series; the other is the name of the engine.
        num_spec_tokens: places in a proposal of drafted tokens that are counted from the start.

    Attributes:
        num_in_flight: HTTP requests that are being answered.
    """

    def __init__(self, model_name: str, num_spec_tokens: int = 1) -> None:
        self.registry = registry = CollectorRegistry()
        self.num_in_flight = 0
        self._model_name = model_name
        self._num_spec_tokens = num_spec_tokens
        counters = _COUNTERS | _ALWAYS_ZERO
        self._families: dict[str, Any] = {
            **{name: Gauge(f"vllm:{name}", text, _LABELS, registry=registry) for name, text in _GAUGES.items()},
            **{name: Counter(f"vllm:{name}", text, _LABELS, registry=registry) for name, text in counters.items()},
            **{name: Counter(f"shoal:{name}", text, _LABELS, registry=registry) for name, text in _RESTARTS.items()},
            **{
                name: Histogram(f"vllm:{name}", text, _LABELS, registry=registry, buckets=buckets)
                for name, (text, buckets) in _HISTOGRAMS.items()
            },
        }
        self._labelled = {
            name: kind(f"vllm:{name}", text, (*_LABELS, label), registry=registry)
            for name, (kind, text, label, _) in _LABELLED.items()
        }
        self._accepted_per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were accepted, by their place in the proposal.",
            (*_LABELS, "position"),
            registry=registry,
        )
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "1, with what the KV cache is as labels.",
            (*_LABELS, *_CACHE_CONFIG),
            registry=registry,
        )
        self._configs: dict[str, tuple[str, ...]] = {}
        self._rejected = Counter(
            "vllm:admission_rejections",
            "Requests that were refused for now, by the setting that bounds them.",
            ("model_name", "reason"),
            registry=registry,
        )
        self._refused = Counter(
            "shoal:requests_refused",
            "POST requests answered with an error in place of a result, by its code.",
            ("model_name", "code"),
            registry=registry,
        )
        self._tasks = Gauge(
            "shoal:api_tasks", "Tasks of the API process's event loop.", ("model_name",), registry=registry
        )
        self._batch_lines = Counter(
            "shoal:batch_lines", "Lines of batches that were answered.", ("model_name", "result"), registry=registry
        )
        for family, values in (
            (self._rejected, _LIMITS),
            (self._refused, CODES),
            (self._batch_lines, ("completed", "failed")),
        ):
            for value in values:
                family.labels(model_name, value)
        self._requests = Counter(
            "http_requests",
            "HTTP requests that were answered, but for those that ask how the server is.",
            ("method", "handler", "status"),
            registry=registry,
        )
        self._request_seconds = Histogram(
            "http_request_duration_seconds",
            "Arrival of an HTTP request to the end of its answer.",
            ("method", "handler"),
            registry=registry,
            buckets=(0.1, 0.5, 1),
        )
        ProcessCollector(registry=registry)
        self._engines: dict[str, ProcessCollector] = {}
        registry.register(_EngineProcesses(model_name, self._engines))
        self._series: dict[str, dict[Any, Any]] = {}
        self._counted: dict[str, SchedulerStats] = {}

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The text for Prometheus in the format that it accepts, and its type; a thread makes it meanwhile."""
        self._tasks.labels(self._model_name).set(len(asyncio.all_tasks()))
        encode, media_type = choose_encoder(accept)
        return await asyncio.to_thread(encode, self.registry), media_type

    # -- engines ---------------------------------------------------------------------------------------------------

    def connected(self, engine: str, ready: Ready, stats: SchedulerStats = NO_STATS) -> None:
        """Take in that an engine is ready.  What it has counted before is not counted here."""
        series, limits = self._of(engine), ready.limits
        self._gauge(engine, stats)
        self._counted[engine] = stats
        series["engine_sleep_state", "awake"].set(1)
        self._engines[engine] = ProcessCollector(pid=lambda: ready.pid, registry=None)
        config = {
            "block_size": limits.block_size,
            "num_gpu_blocks": limits.num_blocks,
            "cache_dtype": ready.kv_cache_dtype,
            "enable_prefix_caching": limits.enable_prefix_caching,
            "prefix_caching_hash_algo": "blake2b",
            "kv_cache_memory_bytes": ready.kv_cache_bytes,
        }
        self._configs[engine] = self._model_name, engine, *(str(config[name]) for name in _CACHE_CONFIG)
        self._cache_config.clear()
        for labels in self._configs.values():
            self._cache_config.labels(*labels).set(1)

    def lost(self, engine: str) -> None:
        """Take in that there is no engine of this name, or none any more."""
        self.stats(engine, NO_STATS)
        self._of(engine)["engine_sleep_state", "awake"].set(0)
        self._engines.pop(engine, None)

    def restarted(self, engine: str, num_resumed: int, seconds: float) -> None:
        """Take in that an engine was replaced: how many requests went on in the new one, after how long a pause."""
        series = self._of(engine)
        series["engine_restarts"].inc()
        series["engine_pause_seconds"].inc(seconds)
        self.resumed(engine, num_resumed)

    def resumed(self, engine: str, num_requests: int) -> None:
        """Take in that requests of an engine that was lost go on in this one."""
        self._of(engine)["requests_resumed"].inc(num_requests)

    def stats(self, engine: str, stats: SchedulerStats) -> None:
        """Take in the scheduler's snapshot after a step of this engine."""
        self._gauge(engine, stats)
        series = self._of(engine)
        before = self._counted.get(engine, NO_STATS)
        self._counted[engine] = stats
        for field, name in _COUNTED.items():
            # When an engine dies the client reports zeros, from which the next one counts again.
            if (gained := getattr(stats, field) - getattr(before, field)) > 0:
                series[name].inc(gained)
        if (num_steps := stats.num_steps - before.num_steps) > 0:
            # Steps of which there was no news on its own share what they computed.
            num_tokens = (stats.num_step_tokens - before.num_step_tokens) / num_steps
            _observe(series["iteration_tokens_total"], num_tokens, num_steps)
        pairs = zip_longest(stats.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, fillvalue=0)
        for position, (now, then) in enumerate(pairs):
            if now > then:
                series["spec_decode_num_accepted_tokens"].inc(now - then)
                self._accepted_per_pos.labels(self._model_name, engine, str(position)).inc(now - then)

    def _gauge(self, engine: str, stats: SchedulerStats) -> None:
        """Set what is as this snapshot says, where the one before said otherwise."""
        series = self._of(engine)
        before = self._counted.get(engine, NO_STATS)
        if stats.num_running != before.num_running:
            series["num_requests_running"].set(stats.num_running)
        if (stats.num_waiting, stats.num_deferred) != (before.num_waiting, before.num_deferred):
            num_deferred = min(stats.num_deferred, stats.num_waiting)  # since the last step some may have left
            series["num_requests_waiting"].set(stats.num_waiting)
            series["num_requests_waiting_by_reason", "capacity"].set(stats.num_waiting - num_deferred)
            series["num_requests_waiting_by_reason", "deferred"].set(num_deferred)
        if stats.kv_cache_usage != before.kv_cache_usage:
            series["kv_cache_usage_perc"].set(stats.kv_cache_usage)

    # -- requests --------------------------------------------------------------------------------------------------

    def refused(self, error: ShoalError) -> None:
        """Take in that a request was answered with this error."""
        self._refused.labels(self._model_name, str(http_error(error).code)).inc()
        if isinstance(error, QueueFullError | RateLimitError):
            self._rejected.labels(self._model_name, str(error.param)).inc()

    def tokens(self, engine: str, told: Sequence[tuple[Journal, RequestOutput]], now: float) -> None:
        """Take in the news of a step, before the journals do; `now` is on their clock."""
        series = self._of(engine)
        num_tokens = 0
        waits: dict[float, int] = {}  # how many requests had waited so long; nearly all have waited alike
        for journal, output in told:
            num_new = len(output.token_ids)
            num_tokens += num_new
            if num_new and journal.last_token_time is not None:
                # Tokens that come together share the time since the last ones.
                each = (now - journal.last_token_time) / num_new
                waits[each] = waits.get(each, 0) + 1
            elif num_new:
                elapsed = now - journal.arrival_time
                series["time_to_first_token_seconds"].observe(elapsed)
                series["request_queue_time_seconds"].observe(output.queue_time)
                series["request_prefill_time_seconds"].observe(max(elapsed - output.queue_time, 0.0))
                _count_prompt(series, len(journal.request.prompt_token_ids), output.num_cached_tokens)
        series["generation_tokens"].inc(num_tokens)
        for each, count in waits.items():
            _observe(series["inter_token_latency_seconds"], each, count)

    def finished(self, journal: Journal, reason: str, now: float) -> None:
        """Take in the end of a request, for whatever reason; `now` is on the clock of the journal."""
        series = self._of(journal.engine)
        series["request_success", reason].inc()
        num_prompt_tokens, num_tokens = len(journal.request.prompt_token_ids), len(journal.output_token_ids)
        if reason == "length" and not num_tokens:  # its prompt was scored, and nothing asked for after it
            _count_prompt(series, num_prompt_tokens, 0)
        series["e2e_request_latency_seconds"].observe(now - journal.arrival_time)
        series["request_prompt_tokens"].observe(num_prompt_tokens)
        series["request_generation_tokens"].observe(num_tokens)
        series["request_params_max_tokens"].observe(journal.request.params.max_tokens)
        series["request_num_preemptions"].observe(journal.num_preemptions)
        if journal.first_token_time is not None and journal.last_token_time is not None:
            decode = journal.last_token_time - journal.first_token_time
            inference = journal.last_token_time - journal.arrival_time - journal.queue_time
            series["request_prefill_kv_computed_tokens"].observe(num_prompt_tokens - journal.num_cached_tokens)
            series["request_decode_time_seconds"].observe(decode)
            series["request_inference_time_seconds"].observe(inference)
            if num_tokens > 1:
                series["request_time_per_output_token_seconds"].observe(decode / (num_tokens - 1))

    def answered(self, choices: Sequence[Journal]) -> None:
        """Take in that all choices of a prompt have ended."""
        series = self._of(choices[0].engine)
        series["request_params_n"].observe(len(choices))
        series["request_max_num_generation_tokens"].observe(max(len(one.output_token_ids) for one in choices))

    def batch_line(self, result: Literal["completed", "failed"]) -> None:
        """Take in that a line of a batch was answered."""
        self._batch_lines.labels(self._model_name, result).inc()

    # -- HTTP ------------------------------------------------------------------------------------------------------

    def serves(self, method: str, handler: str) -> None:
        """Take in that there is an endpoint; the handler is its path, with parameters by their names."""
        self._request_seconds.labels(method, handler)
        for status in ("2xx", "4xx", "5xx"):
            self._requests.labels(method, handler, status)

    def responded(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Take in that an HTTP request was answered."""
        self._requests.labels(method, handler, f"{status // 100}xx").inc()
        self._request_seconds.labels(method, handler).observe(seconds)

    # -- the parts -------------------------------------------------------------------------------------------------

    def totals(self) -> dict[str, float]:
        """The sum of each gauge and counter over the engines."""
        return {
            name: sum(series[name]._value.get() for series in self._series.values()) for name in (*_GAUGES, *_COUNTERS)
        }

    def _of(self, engine: str) -> dict[Any, Any]:
        """The series of an engine, by name, or by name and value of a further label."""
        if engine not in self._series:
            labels = self._model_name, engine
            series: dict[Any, Any] = {name: family.labels(*labels) for name, family in self._families.items()}
            for name, (_, _, _, values) in _LABELLED.items():
                series |= {(name, value): self._labelled[name].labels(*labels, value) for value in values}
            for position in range(self._num_spec_tokens):
                self._accepted_per_pos.labels(*labels, str(position))
            self._series[engine] = series
        return self._series[engine]


class _EngineProcesses(Collector):
    """CPU time and memory of the engines' processes."""

    def __init__(self, model_name: str, engines: Mapping[str, ProcessCollector]) -> None:
        self._model_name = model_name
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            "process_resident_memory_bytes": GaugeMetricFamily(
                "shoal:engine_resident_memory_bytes", "Memory of the engine's process.", labels=_LABELS
            ),
            "process_cpu_seconds": CounterMetricFamily(
                "shoal:engine_cpu_seconds", "CPU time of the engine's process.", labels=_LABELS
            ),
        }
        for engine, process in list(self._engines.items()):
            for metric in process.collect():
                if metric.name in families:
                    families[metric.name].add_metric((self._model_name, engine), metric.samples[0].value)
        return families.values()


def _observe(histogram: Histogram, value: float, count: int) -> None:
    """Observe a value so many times."""
    histogram._sum.inc(value * count)
    histogram._buckets[bisect_left(histogram._upper_bounds, value)].inc(count)


def _count_prompt(series: dict[Any, Any], num_tokens: int, num_cached: int) -> None:
    series["prompt_tokens"].inc(num_tokens)
    series["prompt_tokens_cached"].inc(num_cached)
    series["prompt_tokens_by_source", "local_compute"].inc(num_tokens - num_cached)
    series["prompt_tokens_by_source", "local_cache_hit"].inc(num_cached)
    series["prompt_tokens_cached_by_source", "device"].inc(num_cached)
