"""The figures of /metrics agree with the requests that were served."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server
from tests.server.collector import Collector, attributes
from tests.server.dashboards import missing

# As vLLM documents them (docs/usage/metrics.md and the dashboards in its examples).
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
COUNTERS = {
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_counters_add_up_to_what_was_sent(start: StartServer, collector: Collector) -> None:
    """And so do the traces."""
    tracing = ("--otlp-endpoint", collector.url)
    server = start("--served-model-name", "fish", "--num-blocks", "64", *tracing).wait_ready()
    families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics").text)}
    assert missing([(sample.name, sample.labels) for one in families.values() for sample in one.samples]) == []
    server.http.headers["traceparent"] = f"00-{'ab' * 16}-{'cd' * 8}-01"
    params: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    prompt = "Z" * 40
    used = [server.complete(prompt, **params, max_tokens=8)["usage"] for _ in range(2)]
    used.append(server.complete([prompt, "Z"], **params, max_tokens=5, n=2)["usage"])
    server.stream("/v1/completions", prompt="Z", **params, max_tokens=30, stop="é")
    server.complete("Z", temperature=0, logit_bias={"1": 100})
    assert server.post("/v1/completions", prompt="Z", max_tokens=-2).status_code == 400
    server.wait_idle()

    families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics").text)}
    assert families.keys() >= {f"vllm:{name}" for name in GAUGES | COUNTERS | HISTOGRAMS}
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        assert {families[f"vllm:{name}"].type for name in names} == {kind}
    for name, family in families.items():
        for sample in family.samples:
            assert name.startswith(("http_", "process_")) or sample.labels["model_name"] == "fish"
            assert sample.labels.get("engine", "0") == "0"

    # Requests, not calls: two prompts with two choices are four.
    assert server.metric("request_success_total", finished_reason="length") == 6
    assert server.metric("request_success_total", finished_reason="stop") == 2
    num_prompt_tokens = 40 * 2 + (40 + 1) * 2 + 1 + 1
    assert server.metric("prompt_tokens_total") == server.metric("request_prompt_tokens_sum") == num_prompt_tokens
    assert server.metric("request_prompt_tokens_count") == server.metric("e2e_request_latency_seconds_count") == 8
    num_whole = sum(usage["completion_tokens"] for usage in used)
    assert num_whole == 8 + 8 + 4 * 5
    # The stopped stream made 6 tokens, and perhaps more before the engine heard of it; the last request one.
    assert server.metric("generation_tokens_total") >= num_whole + 6 + 1
    assert server.metric("request_generation_tokens_sum") == server.metric("generation_tokens_total")
    assert server.metric("time_to_first_token_seconds_count") == 8
    assert server.metric("prefix_cache_queries_total") == num_prompt_tokens
    assert server.metric("prefix_cache_hits_total") >= used[1]["prompt_tokens_details"]["cached_tokens"] == 32
    assert used[0]["prompt_tokens_details"]["cached_tokens"] == 0
    assert server.metric("prompt_tokens_cached_total") >= 32
    assert server.metric("prompt_tokens_by_source_total") == num_prompt_tokens
    assert server.metric("request_params_n_count") == server.metric("request_max_num_generation_tokens_count") == 6
    assert server.metric("request_params_n_sum") == 8
    num_found = server.metric("prefix_cache_hits_total")
    assert server.metric("iteration_tokens_total_sum") + num_found >= num_prompt_tokens
    assert server.metric("http_requests_total", handler="/v1/completions", status="2xx") == 5
    assert server.metric("http_requests_total", handler="/v1/completions", status="4xx") == 1
    assert server.metric("http_request_duration_seconds_count", handler="/v1/completions") == 6
    assert server.metric("shoal:engine_resident_memory_bytes") > 10 * 2**20

    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert [attributes(span)["gen_ai.usage.input_tokens"] for span in collector.spans] == [40, 40, 41, 1, 1]
    assert {span.trace_id.hex() for span in collector.spans} == {"ab" * 16}
    assert {span.parent_span_id.hex() for span in collector.spans} == {"cd" * 8}


def test_metrics_are_openmetrics_where_that_is_accepted(tiny: Server) -> None:
    plain = tiny.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    other = tiny.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert other.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert other.text.endswith("# EOF\n")


def test_preemptions_are_counted_and_invisible(start: StartServer) -> None:
    server = start("--num-blocks", "24", "--max-num-seqs", "4").wait_ready()
    answer = server.complete("Z", temperature=0, ignore_eos=True, max_tokens=200, n=4)
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    assert answer["choices"][0]["text"] == server.text("Z", temperature=0, ignore_eos=True, max_tokens=200)
    assert server.metric("num_preemptions_total") > 0
    cut = server.complete([5, 6], temperature=0, ignore_eos=True, max_tokens=385)
    assert cut["usage"]["total_tokens"] == 24 * 16 + 1 and cut["choices"][0]["finish_reason"] == "length"
    error = server.post("/v1/completions", prompt=[5] * 385, max_tokens=1).json()["error"]
    assert error["code"] == "context_length_exceeded" and "24 blocks of 16" in error["message"]
