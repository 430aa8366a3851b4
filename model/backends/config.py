"""What may be set of the backend that computes, and of the KV cache that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.scheduler.config import Config, setting


@dataclass(frozen=True, kw_only=True)
class BackendConfig(Config):
    """What computes the model, and where."""

    device: str = setting("cpu", pattern=r"cpu|cuda(:\d+)?", help="Where the model runs: cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        help="What is multiplied; auto is float32 on the CPU, the checkpoint's own on a GPU.  "
        "On the CPU bfloat16 needs AVX512-BF16, or float32 computes.",
    )
    backend: Literal["auto", "native", "torch"] = setting(
        "auto",
        help="What computes: native is C++ for the CPU; torch runs anywhere; auto is native where possible.",
    )
    quantization: Literal["none", "int8", "int4"] = setting(
        "none",
        help="Bits of weights, and products in integers; only native has int8 and int4, and both change the tokens.",
    )
    threads: int | None = setting(
        None, at_least=1, help="CPU threads that compute; if not set, one for each core that is an engine's."
    )
    pin_threads: bool | None = setting(
        None, help="Whether each compute thread of native stays on one core; decided by itself if not set."
    )

    tensor_parallel: int = setting(1, at_least=1, help="Processes that share the heads and columns of each layer.")
    expert_parallel: int = setting(1, at_least=1, help="Processes that share the experts of each layer.")
    pipeline_parallel: int = setting(1, at_least=1, help="Stages, of which each has layers of its own.")
    parallel_address: str | None = setting(
        None,
        pattern=r"\S+:\d{1,5}",
        help="host:port of this machine, at which ranks join (`shoal rank`); they are started here if not set.",
    )
    parallel_secret_file: Path | None = setting(
        None, help="File with a secret that ranks of other machines share with the engine."
    )
    parallel_wait_seconds: float = setting(60.0, above=0, help="How long ranks may take to join.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Config):
    """The paged KV cache."""

    block_size: int = setting(16, at_least=1, help="Tokens per block; native needs a multiple of 16.")
    num_blocks: int | None = setting(None, at_least=1, help="Blocks in all; as many as memory_mib holds if not set.")
    memory_mib: int | None = setting(
        None,
        at_least=1,
        help="Memory for the KV cache; if not set, what max_num_seqs requests of max_model_len tokens need, "
        "but at most a quarter of the free memory.",
    )
    kv_cache_dtype: Literal["auto", "float32", "float16", "int8"] = setting(
        "auto",
        help="Number format of the KV cache; auto is float32 with native, and with torch what it computes in; only "
        "native has float16 and int8, the latter not for latent attention.",
    )
    enable_prefix_caching: bool = setting(True, help="Whether prompts that start alike share their blocks.")
    share_prefixes: bool = setting(
        False, help="Whether they do so across API keys, so that one can tell what another has asked."
    )
