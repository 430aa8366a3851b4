"""The policy that Serve asks how many engine replicas there should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.scheduler.autoscaling import needed


def autoscale(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy hook: the number of replicas, by what `record_autoscaling_stats` of each said."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    means = {name: sum(of.values()) / len(of) for name, of in metrics.items() if of}
    if not means:
        return context.target_num_replicas, {}
    return needed(context.current_num_replicas, means["queue_seconds"], means["kv_cache_usage"]), {}
