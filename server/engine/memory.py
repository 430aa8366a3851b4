"""How large a KV cache fits this machine."""

from __future__ import annotations

from pathlib import Path

from shoal.model.architecture import ModelConfig, bytes_per_block
from shoal.scheduler.config import CacheGroup
from shoal.scheduler.errors import ConfigError
from shoal.server.settings import Settings

MIB = 1024 * 1024


def plan_kv_cache(
    settings: Settings, *models: ModelConfig, dtype: str, max_model_len: int, free: int
) -> tuple[int, int]:
    """Decide the size of a cache with elements of `dtype`, given the bytes that are free where it will be.

    Args:
        models: those that keep keys and values in each block: the target, and a draft.

    Returns:
        The number of blocks, and their bytes.

    Raises:
        ConfigError: what was asked for exceeds the memory that is free, or holds not even one block.
    """
    cache = settings.cache
    per_block = sum(bytes_per_block(model, dtype, cache.block_size) for model in models)
    if cache.num_blocks is not None:
        num_blocks, param = cache.num_blocks, "num_blocks"
    elif cache.memory_mib is not None:
        num_blocks, param = cache.memory_mib * MIB // per_block, "memory_mib"
    else:
        chunk, groups = settings.scheduler.max_chunk_tokens, scheduled_groups(models[0])
        per_request = sum(group.most_blocks(max_model_len, cache.block_size, chunk) for group in groups)
        wanted = settings.scheduler.max_num_seqs * per_request
        num_blocks, param = min(wanted, free // 4 // settings.engine.engines // per_block), "memory_mib"
    if num_blocks < 1:
        raise ConfigError(f"the KV cache holds not even one block of {per_block} bytes", param=param)
    if num_blocks * per_block > free:
        raise ConfigError(
            f"{param}: a KV cache of {num_blocks} blocks takes {num_blocks * per_block // MIB} MiB, "
            f"but only {free // MIB} MiB of memory are free on {settings.engine.device}: "
            f"at most {free // per_block} blocks fit",
            param=param,
        )
    return num_blocks, num_blocks * per_block


def scheduled_groups(model: ModelConfig) -> tuple[CacheGroup, ...]:
    """The model's cache groups as the scheduler knows them."""
    return tuple(CacheGroup(group.window, group.chunk) for group in model.cache_groups)


def free_memory(device: str) -> int:
    """Bytes that can be allocated on the device.

    Main memory counts as far as it does not swap: what the kernel could hand out, and no more than the container's
    limit leaves.

    Raises:
        ConfigError: this machine has no such device.
    """
    if device != "cpu":
        from shoal.model.backends.torch_device import free_cuda_memory  # noqa: PLC0415 (torch loads if it computes)

        return free_cuda_memory(device)
    meminfo = Path("/proc/meminfo").read_text()
    free = int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free
