"""The Serve application: `shoal.cluster.app:build` for `serve deploy`, and what `shoal cluster up` deploys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve

from shoal.cluster.autoscaling import autoscale
from shoal.cluster.deployments import EngineReplica, IngressReplica, Plan
from shoal.cluster.secret import Keys
from shoal.scheduler.errors import ConfigError
from shoal.server.settings import resolve

_KNOWN = {"secret", "settings", "replicas", "max_replicas", "ingresses", "num_cpus", "num_gpus"}


def build(args: Mapping[str, Any]) -> Any:
    """The application.

    Args:
        args: `secret`, which all processes share; `settings` as in `shoal.toml`; `replicas`, engines, and
            `max_replicas`, up to which there are more under load; `ingresses`, API processes; `num_cpus` and `num_gpus`
            of each engine.

    Raises:
        ConfigError: one of them is wrong.
    """
    for name in args.keys() - _KNOWN:
        raise ConfigError(f"{name}: unknown; expected one of {', '.join(sorted(_KNOWN))}", param=name)
    secret = str(args.get("secret", ""))
    Keys.of(secret)
    settings = resolve(args.get("settings", {}))
    if settings.engine.engines != 1:
        raise ConfigError("engines must be 1: each replica of a cluster has one engine", param="engines")
    plan = Plan(settings.sections(), secret)
    counts = {name: _count(args, name) for name in ("replicas", "ingresses")}
    most = _count(args, "max_replicas", counts["replicas"])
    scale: dict[str, Any] = {"num_replicas": counts["replicas"]}
    if most > counts["replicas"]:
        scale = {
            "autoscaling_config": {
                "min_replicas": counts["replicas"],
                "initial_replicas": counts["replicas"],
                "max_replicas": most,
                "upscale_delay_s": 5,
                "downscale_delay_s": 30,
                "metrics_interval_s": 1,
                "look_back_period_s": 5,
                "policy": {"policy_function": autoscale},
            }
        }
    actor = {"num_cpus": float(args.get("num_cpus", 1)), "num_gpus": float(args.get("num_gpus", 0))}
    common = {"health_check_period_s": 2, "health_check_timeout_s": 30}
    engines = serve.deployment(EngineReplica).options(
        name="engine", ray_actor_options=actor, graceful_shutdown_timeout_s=5, **scale, **common
    )
    ingress = serve.deployment(IngressReplica).options(
        name="ingress",
        num_replicas=counts["ingresses"],
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.server.drain_seconds + 10,
        **common,
    )
    return ingress.bind(plan, engines.bind(plan))


def _count(args: Mapping[str, Any], name: str, default: int = 1) -> int:
    count = args.get(name, default)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"{name} must be an integer, at least 1, not {count!r}", param=name)
    return count
