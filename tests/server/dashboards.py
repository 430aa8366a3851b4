"""What the dashboards ask for that vLLM publishes (examples/observability, November 2026): names, and labels by value.

Left out is what vLLM itself has only with an option: LoRA, KV connectors, sampled blocks, estimated FLOPs, sleep mode's
operations.
"""

from __future__ import annotations

from collections.abc import Iterator

_PARTS = ("bucket", "sum", "count")


def _histogram(*names: str) -> list[str]:
    return [f"{name}_{part}" for name in names for part in _PARTS]


_LOAD = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
_TOKENS = ["prompt_tokens_total", "generation_tokens_total"]
_LATENCIES = _histogram("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds")
_WAITING = [f'num_requests_waiting_by_reason{{reason="{reason}"}}' for reason in ("capacity", "deferred")]
_SOURCES = [
    f'prompt_tokens_by_source_total{{source="{source}"}}'
    for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
]
_CACHES = [
    f"{cache}_cache_{kind}_total" for cache in ("prefix", "external_prefix", "mm") for kind in ("hits", "queries")
]
DASHBOARDS = {
    "grafana": [
        *(*_LOAD, *_TOKENS, *_LATENCIES),
        *("request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_success_total"),
        *("request_queue_time_seconds_sum", "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum"),
        "request_max_num_generation_tokens_sum",
    ],
    "overview": [
        *(*_LOAD, *_TOKENS, *_LATENCIES, *_WAITING, *_SOURCES, *_CACHES),
        *('request_success_total{finished_reason="error"}', "num_preemptions_total"),
        *_histogram("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *_histogram("iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens"),
        *_histogram("request_time_per_output_token_seconds"),
        *(f'time_to_first_token_seconds_bucket{{le="{le}"}}' for le in (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)),
        *(
            f'request_time_per_output_token_seconds_bucket{{le="{le}"}}'
            for le in (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5)
        ),
    ],
    "instances": [
        *(*_LOAD, *_TOKENS, *_WAITING, "request_success_total", "num_preemptions_total"),
        *_histogram("iteration_tokens_total"),
        *('engine_sleep_state{sleep_state="awake"}', 'engine_sleep_state{sleep_state="discard_all"}'),
        "cache_config_info",
    ],
    "kv cache": [
        *(*_LOAD, *_WAITING, *_SOURCES, *_CACHES, "prompt_tokens_cached_total"),
        'prompt_tokens_cached_by_source_total{source="device"}',
        *_histogram("request_prompt_tokens", "request_prefill_kv_computed_tokens"),
    ],
    "speculative decoding": [
        *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "generation_tokens_total"),
        *("spec_decode_num_accepted_tokens_total", 'spec_decode_num_accepted_tokens_per_pos_total{position="0"}'),
    ],
    "service status": ['engine_sleep_state{sleep_state="awake"}', "num_requests_running", "generation_tokens_total"],
}
# What a live vLLM exposes beside: nothing of it is on a dashboard.
OTHERS = [
    *_histogram("request_inference_time_seconds", "request_params_n", "request_params_max_tokens"),
    *_histogram("request_max_num_generation_tokens", "request_num_preemptions"),
    *("prompt_tokens_recomputed_total", "admission_rejections_total"),
]
# Without the prefix `vllm:`.
OF_THE_PROCESS = [
    *("process_start_time_seconds", "process_cpu_seconds_total", "process_resident_memory_bytes"),
    *("process_open_fds", "process_max_fds"),
    *(f'http_requests_total{{handler="/v1/completions",method="POST",status="{one}xx"}}' for one in (2, 4, 5)),
    *("http_request_duration_seconds_sum", "http_request_duration_seconds_count"),
]


def wanted() -> Iterator[tuple[str, dict[str, str]]]:
    """Each name, and the labels by which it is asked for."""
    names = {f"vllm:{name}" for some in (*DASHBOARDS.values(), OTHERS) for name in some} | set(OF_THE_PROCESS)
    for name in sorted(names):
        family, _, labels = name.rstrip("}").partition("{")
        pairs = (label.split("=") for label in labels.split(",") if label)
        yield family, {label: value.strip('"') for label, value in pairs}


def missing(samples: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """Which of them are not among these samples."""
    return [
        (name, labels)
        for name, labels in wanted()
        if not any(name == found and labels.items() <= others.items() for found, others in samples)
    ]
