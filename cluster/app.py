"""The Serve application: `shoal.cluster.app:build` for `serve deploy`, and the configuration that `up` deploys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from shoal.cluster.deployments import EngineReplica, IngressReplica, Plan
from shoal.cluster.secret import Keys
from shoal.scheduler.autoscaling import DOWNSCALE_SECONDS, INTERVAL_SECONDS, LOOK_BACK_SECONDS, UPSCALE_SECONDS
from shoal.scheduler.errors import ConfigError
from shoal.server.settings import resolve

INGRESS_BYTES = 128 * 2**20  # of an API process; Ray would put all of them on one node if they demanded nothing
SCALING = {
    "upscale_delay_s": UPSCALE_SECONDS,
    "downscale_delay_s": DOWNSCALE_SECONDS,
    "metrics_interval_s": INTERVAL_SECONDS,
    "look_back_period_s": LOOK_BACK_SECONDS,
    "policy": {"policy_function": "shoal.cluster.autoscaling:autoscale"},
}


def plan(args: Mapping[str, Any]) -> Plan:
    """What the arguments of an application say.

    Args:
        args: `secret`, or `secret_file` that has it, and `settings` by sections, as in `shoal.toml`.

    Raises:
        ConfigError: one of them is wrong.
    """
    for name in args.keys() - {"secret", "secret_file", "settings"}:
        raise ConfigError(f"{name}: unknown argument; expected secret or secret_file, and settings", param=name)
    settings = resolve(args.get("settings", {}))
    if settings.engine.engines != 1:
        raise ConfigError("engines must be 1: each replica of a cluster has one engine", param="engines")
    file = args.get("secret_file")
    try:
        secret = str(args.get("secret", "")) if file is None else Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"secret_file: {file}: {error}", param="secret_file") from error
    Keys.of(secret)
    return Plan(settings.sections(), secret)


def build(args: Mapping[str, Any]) -> Any:
    """The application, whose deployments are named `engine` and `ingress`.

    Args:
        args: see `plan`.

    Raises:
        ConfigError: one of them is wrong.
    """
    made = plan(args)
    common = {"health_check_period_s": 2, "health_check_timeout_s": 30, "graceful_shutdown_wait_loop_s": 0.1}
    engines = serve.deployment(EngineReplica, name="engine", graceful_shutdown_timeout_s=5, **common)
    ingress = serve.deployment(
        IngressReplica,
        name="ingress",
        ray_actor_options={"num_cpus": 0, "memory": INGRESS_BYTES},
        graceful_shutdown_timeout_s=made.settings().server.drain_seconds + 10,
        **common,
    )
    return ingress.bind(made, engines.bind(made))


def configure(
    name: str,
    args: Mapping[str, Any],
    *,
    replicas: int,
    max_replicas: int,
    ingresses: int,
    num_cpus: float,
    num_gpus: float,
    has_room: bool = False,
) -> dict[str, Any]:
    """The configuration of Serve.  A change of the numbers alone starts no replica anew.

    Args:
        has_room: for one engine more; then an update starts an engine before it takes one away.
    """
    scale: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas > replicas:
        scale = {"autoscaling_config": {"min_replicas": replicas, "max_replicas": max_replicas, **SCALING}}
    return {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": name,
                "route_prefix": None,
                "import_path": "shoal.cluster.app:build",
                "args": dict(args),
                "deployments": [
                    {
                        "name": "engine",
                        **scale,
                        "max_surge_percent": int(has_room),  # rounded up to one engine
                        "ray_actor_options": {"num_cpus": num_cpus, "num_gpus": num_gpus},
                    },
                    {"name": "ingress", "num_replicas": ingresses},
                ],
            }
        ],
    }
