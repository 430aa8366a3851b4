"""Prometheus metrics, under vLLM's names, so that dashboards made for it work."""

from __future__ import annotations

from itertools import zip_longest

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shoal.scheduler.output import RequestOutput, SchedulerStats
from shoal.server.engine.journal import Journal

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_LABELS = ("model_name", "engine")


class Metrics:
    """What the server counts and times, all seen from the API process.

    Args:
        model_name: the label of every series.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._counted = SchedulerStats(0, 0, 0.0, 0, 0, 0)

        self._running = self._gauge("num_requests_running", "Requests in the batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1.")
        self._preemptions = self._counter("num_preemptions", "Preemptions.")
        self._prefix_queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self._drafts = self._counter("spec_decode_num_drafts", "Proposals of drafted tokens that were verified.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self._accepted_per_pos = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were accepted, by their place in the proposal.",
            (*_LABELS, "position"),
            registry=self.registry,
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "Token to token.", _TOKEN_SECONDS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_SECONDS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first step.", _SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token.", _SECONDS)
        self._inference = self._histogram("request_inference_time_seconds", "First step to last token.", _SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last token.", _SECONDS)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output_length = self._histogram("request_generation_tokens", "Tokens generated in a request.", _TOKENS)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def scheduler(self, stats: SchedulerStats) -> None:
        """Take in the scheduler's snapshot after a step."""
        before, self._counted = self._counted, stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._usage.set(stats.kv_cache_usage)
        for counter, name in (
            (self._preemptions, "num_preemptions"),
            (self._prefix_queries, "num_prefix_queries"),
            (self._prefix_hits, "num_prefix_hits"),
            (self._drafts, "num_drafts"),
            (self._draft_tokens, "num_draft_tokens"),
        ):
            # When an engine dies the client reports zeros, from which the next one counts again.
            counter.inc(max(getattr(stats, name) - getattr(before, name), 0))
        pairs = zip_longest(stats.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, fillvalue=0)
        for position, (now, then) in enumerate(pairs):
            if now > then:
                self._accepted_tokens.inc(now - then)
                self._accepted_per_pos.labels(**self._labels, position=str(position)).inc(now - then)

    def tokens(self, journal: Journal, output: RequestOutput, now: float) -> None:
        """Take in a request's new tokens, before its journal does."""
        if not output.token_ids:
            return
        self._generation_tokens.inc(len(output.token_ids))
        if journal.last_token_time is None:
            arrival = journal.request.arrival_time
            self._ttft.observe(now - arrival)
            self._queue.observe(output.queue_time)
            self._prefill.observe(max(now - arrival - output.queue_time, 0.0))
            self._prompt_tokens.inc(len(journal.request.prompt_token_ids))
        else:
            # Tokens that come together share the time since the last ones.
            self._itl.observe((now - journal.last_token_time) / len(output.token_ids))

    def finished(self, journal: Journal, reason: str, now: float) -> None:
        """Take in the end of a request, for whatever reason."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        num_tokens = len(journal.output_token_ids)
        if reason == "length" and not num_tokens:  # its prompt was scored, and nothing asked for after it
            self._prompt_tokens.inc(len(journal.request.prompt_token_ids))
        self._e2e.observe(now - journal.request.arrival_time)
        self._prompt_length.observe(len(journal.request.prompt_token_ids))
        self._output_length.observe(num_tokens)
        if journal.first_token_time is not None and journal.last_token_time is not None:
            decode = journal.last_token_time - journal.first_token_time
            self._decode.observe(decode)
            self._inference.observe(journal.last_token_time - journal.request.arrival_time - journal.queue_time)
            if num_tokens > 1:
                self._tpot.observe(decode / (num_tokens - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, _LABELS, registry=self.registry, buckets=buckets).labels(**self._labels)
