"""What the API process and the engine process say to each other: msgpack over zmq."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.scheduler.output import RequestOutput, SamplingParams, SchedulerStats, SchedulingParams

DType = Literal["float32", "bfloat16"]
KVCacheDType = Literal["float32", "float16", "bfloat16"]


class EngineConfig(msgspec.Struct, frozen=True):
    """All that the engine process needs to start; resolved from the settings, see there for the meaning."""

    checkpoint: str
    device: str
    dtype: DType | Literal["auto"]
    backend: Literal["auto", "native", "torch"]
    quantization: Literal["none", "int8"]
    threads: int | None
    pin_threads: bool | None
    max_model_len: int | None
    trace: str | None
    block_size: int
    num_blocks: int | None
    memory_mib: int | None
    kv_cache_dtype: Literal["auto", "float32", "float16"]
    enable_prefix_caching: bool
    policy: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    max_num_waiting: int
    ageing_seconds: float
    ageing_tokens: float
    predictor: Literal["max_tokens", "learned"]
    prompt_weight: float
    output_weight: float
    fair_lead: float
    ttft_slo_ms: float
    tpot_slo_ms: float
    static_timeout_seconds: float
    speculation: Literal["off", "draft", "ngram", "self"]
    num_spec_tokens: int | None
    draft_checkpoint: str | None
    draft_layers: int | None
    verification: Literal["coupled", "rejection"]


class EngineRequest(msgspec.Struct, frozen=True):
    """A request as it crosses to the engine.

    Attributes:
        arrival_time: seconds on the monotonic clock that all processes of a machine share.
        output_token_ids: tokens that an earlier engine generated already; the request goes on after them.
        scheduling: what the policy may know of it.
        speculates: whether tokens may be drafted for it.
        end_after: the model is made to end the text with this output token; None leaves the end to it.  Nothing that
            schedules is told.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    output_token_ids: list[int] = []
    scheduling: SchedulingParams = SchedulingParams()
    speculates: bool = True
    end_after: int | None = None


class Submit(msgspec.Struct, tag=True):
    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag=True):
    request_ids: list[str]


class Ready(msgspec.Struct, tag=True):
    """The engine has loaded its model and waits for requests.

    Attributes:
        num_parameters: of the model.
        kv_cache_bytes: size of the KV cache.
        description: of the backend, for people.
        warning: what the user should know of the choice of backend, if anything.
    """

    num_blocks: int
    max_model_len: int
    num_parameters: int
    kv_cache_bytes: int
    description: str
    warning: str | None


class StartFailed(msgspec.Struct, tag=True):
    """The engine cannot start, and would not the next time either."""

    message: str
    param: str | None


class News(msgspec.Struct, tag=True):
    """What came of a step."""

    outputs: list[RequestOutput]
    stats: SchedulerStats


Command = Submit | Abort
Report = Ready | StartFailed | News
