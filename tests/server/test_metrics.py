from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest
from shoal.server.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    (sample,) = [
        sample
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == f"vllm:{name}" and labels.items() <= sample.labels.items()
    ]
    assert sample.labels["model_name"] == "fish"
    return sample.value


def test_the_schedulers_counters_go_on_when_a_new_engine_starts() -> None:
    metrics = Metrics("fish")
    for stats in (
        SchedulerStats(3, 2, 0.5, 7, 100, 60),
        SchedulerStats(1, 0, 0.25, 8, 130, 70),
        SchedulerStats(0, 0, 0.0, 0, 0, 0),
        SchedulerStats(4, 1, 0.125, 9, 200, 5),
    ):
        metrics.stats("0", stats)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [value(metrics, name) for name in names] == [4, 1, 0.125]
    assert value(metrics, "num_preemptions_total") == 8 + 9
    assert value(metrics, "prefix_cache_queries_total") == 130 + 200
    assert value(metrics, "prefix_cache_hits_total") == 70 + 5


def test_the_life_of_a_request() -> None:
    """Arrival at 10 s, a second in the queue, tokens at 13 s and, three at once, at 16 s."""
    metrics = Metrics("fish")
    journal = Journal(EngineRequest("a", [1] * 20, SamplingParams(max_tokens=4, seed=0)), "0", 10.0)
    for output, now in (
        (RequestOutput("a", [], prompt_logprobs=[]), 12.0),
        (RequestOutput("a", [5], queue_time=1.0), 13.0),
        (RequestOutput("a", [5, 5, 5]), 16.0),
    ):
        metrics.tokens(journal, output, now)
        journal.note(output, now)
    metrics.finished(journal, "length", 16.5)
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    sums = {
        "time_to_first_token_seconds": 3.0,
        "request_queue_time_seconds": 1.0,
        "request_prefill_time_seconds": 2.0,
        "request_decode_time_seconds": 3.0,
        "inter_token_latency_seconds": 1.0,
        "request_time_per_output_token_seconds": 1.0,
        "e2e_request_latency_seconds": 6.5,
        "request_prompt_tokens": 20,
        "request_generation_tokens": 4,
    }
    assert {name: value(metrics, f"{name}_sum") for name in sums} == pytest.approx(sums)
    assert (value(metrics, "prompt_tokens_total"), value(metrics, "generation_tokens_total")) == (20, 4)


def test_a_prompt_that_is_only_scored_counts() -> None:
    metrics = Metrics("fish")
    journal = Journal(EngineRequest("a", [1] * 20, SamplingParams(max_tokens=0, seed=0)), "0", 10.0)
    metrics.tokens(journal, RequestOutput("a", [], FinishReason.LENGTH), 11.0)
    metrics.finished(journal, "length", 11.0)
    assert (value(metrics, "prompt_tokens_total"), value(metrics, "generation_tokens_total")) == (20, 0)


def test_a_request_that_ended_in_the_queue_took_no_time_to_decode() -> None:
    metrics = Metrics("fish")
    journal = Journal(EngineRequest("a", [1], SamplingParams(max_tokens=4, seed=0)), "0", 10.0)
    metrics.finished(journal, "abort", 11.0)
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "e2e_request_latency_seconds_sum") == 1.0
    assert value(metrics, "request_decode_time_seconds_count") == 0
    assert value(metrics, "time_to_first_token_seconds_count") == 0
    assert value(metrics, "prompt_tokens_total") == 0


def test_each_engine_has_series_of_its_own() -> None:
    metrics = Metrics("fish")
    metrics.stats("left", SchedulerStats(3, 2, 0.5, 7, 100, 60))
    metrics.stats("right", SchedulerStats(1, 0, 0.25, 1, 10, 6))
    metrics.stats("left", SchedulerStats(0, 0, 0.0, 9, 100, 60))
    assert [value(metrics, "num_preemptions_total", engine=name) for name in ("left", "right")] == [9, 1]
    assert value(metrics, "num_requests_running", engine="right") == 1
    assert metrics.totals()["num_preemptions"] == 10
