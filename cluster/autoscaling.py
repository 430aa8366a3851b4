"""How many engines a cluster needs."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

QUEUE_SECONDS, KV_CACHE_USAGE = 1.0, 0.7  # that the mean over the engines should have


def needed(num_engines: int, queue_seconds: float, kv_cache_usage: float) -> int:
    """The number of engines with which the means of both would be what they should be, each being shared out."""
    return max(1, ceil(num_engines * max(queue_seconds / QUEUE_SECONDS, kv_cache_usage / KV_CACHE_USAGE)))


def autoscale(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy hook: the number of replicas, by what `record_autoscaling_stats` of each said."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    means = {name: sum(of.values()) / len(of) for name, of in metrics.items() if of}
    if not means:
        return context.target_num_replicas, {}
    return needed(context.current_num_replicas, means["queue_seconds"], means["kv_cache_usage"]), {}
