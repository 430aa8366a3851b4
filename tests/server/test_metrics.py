from __future__ import annotations

import os

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import InvalidRequestError, QueueFullError
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest, Ready
from shoal.server.errors import RateLimitError
from shoal.server.metrics import Metrics
from tests.server.dashboards import missing

READY = Ready(SchedulerConfig(num_blocks=64, max_model_len=512), 1, 4096, "played", None, "float16", os.getpid())


def value(metrics: Metrics, name: str, **labels: str) -> float:
    (sample,) = [
        sample
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
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
        (RequestOutput("a", [5], queue_time=1.0, num_cached_tokens=16), 13.0),
        (RequestOutput("a", [5, 5, 5], num_preemptions=2), 16.0),
    ):
        metrics.tokens("0", [(journal, output)], now)
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
        "request_prefill_kv_computed_tokens": 4,
        "request_params_max_tokens": 4,
        "request_num_preemptions": 2,
        "request_inference_time_seconds": 5.0,
    }
    assert {name: value(metrics, f"{name}_sum") for name in sums} == pytest.approx(sums)
    assert (value(metrics, "prompt_tokens_total"), value(metrics, "generation_tokens_total")) == (20, 4)
    sources = {"local_compute": 4, "local_cache_hit": 16, "external_kv_transfer": 0}
    assert {one: value(metrics, "prompt_tokens_by_source_total", source=one) for one in sources} == sources
    assert value(metrics, "prompt_tokens_cached_total") == 16
    assert value(metrics, "prompt_tokens_cached_by_source_total", source="device") == 16


def test_a_prompt_that_is_only_scored_counts() -> None:
    metrics = Metrics("fish")
    journal = Journal(EngineRequest("a", [1] * 20, SamplingParams(max_tokens=0, seed=0)), "0", 10.0)
    metrics.tokens("0", [(journal, RequestOutput("a", [], FinishReason.LENGTH))], 11.0)
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


def samples(metrics: Metrics) -> list[tuple[str, dict[str, str]]]:
    return [(sample.name, sample.labels) for family in metrics.registry.collect() for sample in family.samples]


def test_every_series_is_there_from_the_start() -> None:
    """Those that vLLM's dashboards ask for are, and no event adds one."""
    metrics = Metrics("fish", num_spec_tokens=2)
    metrics.lost("0")
    metrics.connected("0", READY)
    metrics.serves("POST", "/v1/completions")
    assert missing(samples(metrics)) == []

    before = {(name, *sorted(labels.items())) for name, labels in samples(metrics)}
    journal = Journal(EngineRequest("a", [1] * 20, SamplingParams(max_tokens=4, seed=0)), "0", 10.0)
    metrics.stats("0", SchedulerStats(3, 2, 0.5, 7, 100, 60, 2, 4, [2, 1], 1, 3, 40))
    metrics.tokens("0", [(journal, RequestOutput("a", [5]))], 13.0)
    journal.note(RequestOutput("a", [5]), 13.0)
    for reason in ("stop", "length", "abort", "error"):
        metrics.finished(journal, reason, 14.0)
    metrics.answered([journal])
    metrics.restarted("0", 1, 2.0)
    metrics.refused(QueueFullError("full", param="max_num_waiting"))
    metrics.batch_line("failed")
    metrics.responded("POST", "/v1/completions", 503, 0.1)
    assert {(name, *sorted(labels.items())) for name, labels in samples(metrics)} == before


def test_steps_without_news_share_what_they_computed() -> None:
    metrics = Metrics("fish")
    for num_steps, num_tokens in ((1, 100), (4, 1000), (4, 1000), (5, 1001)):
        metrics.stats("0", SchedulerStats(1, 0, 0.5, 0, 0, 0, num_steps=num_steps, num_step_tokens=num_tokens))
    assert value(metrics, "iteration_tokens_total_count") == 5
    assert value(metrics, "iteration_tokens_total_sum") == 1001
    assert value(metrics, "iteration_tokens_total_bucket", le="256.0") == 2
    assert value(metrics, "iteration_tokens_total_bucket", le="512.0") == 5


def test_what_waits_is_counted_by_reason() -> None:
    metrics = Metrics("fish")
    for num_waiting, num_deferred, capacity, deferred in ((5, 2, 3, 2), (1, 2, 0, 1), (0, 0, 0, 0)):
        metrics.stats("0", SchedulerStats(1, num_waiting, 0.5, 0, 0, 0, num_deferred=num_deferred))
        assert value(metrics, "num_requests_waiting") == num_waiting
        assert value(metrics, "num_requests_waiting_by_reason", reason="capacity") == capacity
        assert value(metrics, "num_requests_waiting_by_reason", reason="deferred") == deferred


def test_refusals_are_counted_by_what_bounds_them() -> None:
    metrics = Metrics("fish")
    for error in (
        QueueFullError("full", param="max_queue_seconds"),
        RateLimitError("enough", param="key_max_requests"),
        InvalidRequestError("no", param="max_tokens"),
    ):
        metrics.refused(error)
    reasons = {
        sample.labels["reason"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "vllm:admission_rejections_total" and sample.value
    }
    assert reasons == {"max_queue_seconds": 1, "key_max_requests": 1}


def test_the_longest_choice_of_a_prompt() -> None:
    metrics = Metrics("fish")
    params = SamplingParams(max_tokens=4, seed=0)
    choices = [Journal(EngineRequest(f"a-0-{i}", [1], params), "0", 10.0, [5] * i) for i in range(3)]
    metrics.answered(choices)
    assert value(metrics, "request_params_n_sum") == 3
    assert value(metrics, "request_max_num_generation_tokens_sum") == 2


def test_an_engine_that_is_there_is_awake_and_has_a_process() -> None:
    metrics = Metrics("fish")
    labels = {"model_name": "fish", "engine": "0"}
    for is_there in (False, True, False, True):
        metrics.connected("0", READY) if is_there else metrics.lost("0")
        assert value(metrics, "engine_sleep_state", sleep_state="awake") == is_there
        memory = metrics.registry.get_sample_value("shoal:engine_resident_memory_bytes", labels)
        cpu = metrics.registry.get_sample_value("shoal:engine_cpu_seconds_total", labels)
        assert (memory is not None, cpu is not None) == (is_there, is_there)
        assert memory is None or memory > 2**20
    config = {"block_size": "16", "num_gpu_blocks": "64", "cache_dtype": "float16", "enable_prefix_caching": "True"}
    assert value(metrics, "cache_config_info", **config) == 1
