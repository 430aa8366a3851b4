"""How much memory is free where torch computes."""

from __future__ import annotations

import torch

from shoal.scheduler.errors import ConfigError


def free_cuda_memory(device: str) -> int:
    """Bytes that can be allocated on a device, "cuda" or "cuda:N".

    Raises:
        ConfigError: this machine has no such device.
    """
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices",
            param="device",
        )
    return int(torch.cuda.mem_get_info(index)[0])
