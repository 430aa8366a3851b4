"""How large a KV cache fits this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig, bytes_per_block
from scheduler.errors import ConfigError
from server.engine.messages import EngineConfig

MIB = 1024 * 1024


@dataclass(frozen=True)
class KVCachePlan:
    num_blocks: int
    num_bytes: int


def plan_kv_cache(config: EngineConfig, model: ModelConfig, dtype: str, max_model_len: int) -> KVCachePlan:
    """Decide the number of blocks.

    Raises:
        ConfigError: what was asked for exceeds the memory that is free, or holds not even one block.
    """
    per_block = bytes_per_block(model, dtype, config.block_size)
    free = available_memory(config.device)
    if config.num_blocks is not None:
        num_blocks, param = config.num_blocks, "num_blocks"
    elif config.memory_mib is not None:
        num_blocks, param = config.memory_mib * MIB // per_block, "memory_mib"
    else:
        wanted = config.max_num_seqs * -(-max_model_len // config.block_size)
        num_blocks, param = min(wanted, free // 4 // per_block), "memory_mib"
    if num_blocks < 1:
        raise ConfigError(f"the KV cache holds not even one block of {per_block} bytes", param=param)
    if num_blocks * per_block > free:
        raise ConfigError(
            f"{param}: a KV cache of {num_blocks} blocks takes {num_blocks * per_block // MIB} MiB, "
            f"but only {free // MIB} MiB of memory are free on {config.device}: at most {free // per_block} blocks fit",
            param=param,
        )
    return KVCachePlan(num_blocks, num_blocks * per_block)


def available_memory(device: str) -> int:
    """Bytes that can be allocated on the device without swapping."""
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415 (only where a GPU is asked for)

        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("cannot tell how much memory is free: /proc/meminfo has no MemAvailable", param="memory_mib")
