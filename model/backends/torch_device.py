"""What torch can compute on, and how much memory is free there."""

from __future__ import annotations

from pathlib import Path

import torch

from scheduler.errors import ConfigError


def free_memory(device: str) -> int:
    """Bytes that can be allocated on a device without swapping.

    Raises:
        ConfigError: this machine has no such device, or it is of a kind that the backend does not run on.
    """
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is unknown; use cpu, cuda or cuda:N", param="device")
    if kind == "cpu":
        return _free_main_memory()
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices",
            param="device",
        )
    return int(torch.cuda.mem_get_info(index)[0])


def _free_main_memory() -> int:
    """What the kernel could hand out, and no more than the container's limit leaves."""
    meminfo = Path("/proc/meminfo").read_text()
    free = int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free
