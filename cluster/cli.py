"""The commands `shoal cluster up`, `status` and `down`."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from shoal.extras import install_command
from shoal.scheduler.errors import ConfigError, ShoalError
from shoal.server.sources import load_settings
from shoal.terminal import CommandError, echo_json, json_option, show

APP_NAME = "shoal"
REACH_SECONDS, READY_SECONDS = 5.0, 300.0

Result = TypeVar("Result")

_address = click.option("--address", metavar="HOST:PORT", help="Of a Ray cluster; one on this machine if not set.")


@click.group()
def cluster() -> None:
    """Serve a model by several engines on several machines, which Ray Serve places, restarts and scales."""


@cluster.command(context_settings={"ignore_unknown_options": True})
@click.option("--replicas", default=2, show_default=True, type=click.IntRange(min=1), help="Engines.")
@click.option("--max-replicas", type=click.IntRange(min=1), help="Engines under load  [as many as --replicas]")
@click.option("--ingresses", default=1, show_default=True, type=click.IntRange(min=1), help="API processes.")
@click.option("--num-cpus", default=1.0, show_default=True, type=click.FloatRange(min=0), help="Of each engine.")
@click.option("--num-gpus", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Of each engine.")
@click.option(
    "--secret-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the secret that all processes share; one is made if not set.",
)
@_address
@json_option
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF SHOAL SERVE]...")
def up(
    options: Sequence[str],
    secret_file: Path | None,
    address: str | None,
    as_json: bool,
    max_replicas: int | None,
    **counts: Any,
) -> None:
    """Bring a cluster up, or change the one that is up; returns when it answers.

    Where no Ray cluster is named, and none runs on this machine, a Ray node is started.
    """

    def work() -> dict[str, Any]:
        from shoal.cluster.app import configure, plan  # noqa: PLC0415

        given = None if secret_file is None else secret_file.read_text("utf-8").strip()
        secret = given or secrets.token_hex(32)
        settings = _plain(load_settings(list(options)).sections())
        plan({"secret": secret, "settings": settings})
        _connect(address, starts=True)
        _check_model(settings)
        args = {"secret": given or _kept(secret), "settings": settings}
        most = max_replicas or counts["replicas"]
        has_room = _has_room(counts["replicas"], counts["num_cpus"], counts["num_gpus"])
        _update(configure(APP_NAME, args, **counts, max_replicas=most, has_room=has_room))
        return _status()

    _report("cluster up", as_json, work)


@cluster.command()
@_address
@json_option
def status(address: str | None, as_json: bool) -> None:
    """Show where the API processes and the engines are."""

    def work() -> dict[str, Any]:
        _connect(address)
        return _status()

    _report("cluster status", as_json, work)


@cluster.command()
@_address
def down(address: str | None) -> None:
    """End the cluster, and the Ray node if `up` started it."""
    from shoal.cluster.ray_node import end_node  # noqa: PLC0415

    def work() -> dict[str, Any]:
        import ray  # noqa: PLC0415
        from ray import serve  # noqa: PLC0415

        from shoal.cluster.deployments import find_directory  # noqa: PLC0415

        _connect(address)
        serve.delete(APP_NAME)
        ray.kill(find_directory(APP_NAME))
        ray.shutdown()
        return {}

    _attempt("cluster down", work)
    end_node()


# -- the parts ---------------------------------------------------------------------------------------------------------


def _report(command: str, as_json: bool, work: Callable[[], dict[str, Any]]) -> None:
    found = _attempt(command, work)
    if as_json:
        echo_json(found)
        return
    for title, rows in found.items():
        if rows:
            show(title, rows)
        else:
            click.echo(f"\n{title}: none")


def _attempt(command: str, work: Callable[[], Result]) -> Result:
    """Do it, if Ray is there.

    Raises:
        CommandError: it cannot be done.
    """
    if find_spec("ray") is None:
        raise CommandError(command, f"Ray is not installed: run `{install_command('cluster')}`")
    try:
        return work()
    except ShoalError as error:
        raise CommandError(command, error.message) from error


def _connect(address: str | None, *, starts: bool = False) -> None:
    """Connect to a Ray cluster: the one that is named, or the one of this machine.

    Raises:
        ConfigError: there is none.
    """
    import ray  # noqa: PLC0415

    from shoal.cluster.deployments import NAMESPACE  # noqa: PLC0415
    from shoal.cluster.ray_node import noted_address, start_node  # noqa: PLC0415

    found = address or noted_address() or (start_node() if starts else None)
    if found is None:
        raise ConfigError("no cluster is up on this machine; name one with --address", param="address")
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()  # Ray would try for minutes
        ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster answers at {found}: {error}", param="address") from error


def _status() -> dict[str, Any]:
    import ray  # noqa: PLC0415

    from shoal.cluster.deployments import find_directory  # noqa: PLC0415

    found = msgspec.to_builtins(ray.get(find_directory(APP_NAME).describe.remote()))
    return {"API processes": found["servers"], "engines": found["engines"]}


def _kept(secret: str) -> str:
    """The secret of the cluster that is up, or else this one, which is kept for the next time."""
    import ray  # noqa: PLC0415

    from shoal.cluster.deployments import find_directory  # noqa: PLC0415

    kept: str = ray.get(find_directory(APP_NAME).keep_secret.remote(secret))
    return kept


def _plain(sections: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(sections, enc_hook=str))
    return plain


def why_not(app: Any) -> str:
    """What is said of each deployment that is not as it should be: the last line of its trace; else of the application.

    Args:
        app: its status, as Serve has it.
    """
    lines = [one.message.rstrip().rpartition("\n")[2] for one in app.deployments.values() if one.status != "HEALTHY"]
    said = [line.partition("Error: ")[2] or line for line in lines]
    return "; ".join(filter(None, said)) or str(app.message)


def _check_model(settings: dict[str, Any]) -> None:
    """Have each node that has engines look at the model first, so that none of them ends for one that cannot start.

    Raises:
        ShoalError: what is wrong with the model.
    """
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    from shoal.cluster.deployments import check_model  # noqa: PLC0415

    check = ray.remote(num_cpus=0)(check_model)
    nodes = {engine["node"] for engine in _status()["engines"]}
    there = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    try:
        ray.get([check.options(scheduling_strategy=node).remote(settings) for node in there])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _has_room(replicas: int, num_cpus: float, num_gpus: float) -> bool:
    """Whether the nodes have room for one engine more than there are to be."""
    from ray._private.state import available_resources_per_node  # noqa: PLC0415

    demands = {"CPU": num_cpus, "GPU": num_gpus}
    room = sum(
        min((free.get(kind, 0.0) // demand for kind, demand in demands.items() if demand), default=inf)
        for free in available_resources_per_node().values()
    )
    return room > replicas - len(_status()["engines"])


def _update(configuration: dict[str, Any]) -> None:
    """Have Serve bring about what the configuration says, or else what was there before.

    Raises:
        ConfigError: it cannot.
    """
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415
    from ray.serve.context import _get_global_client  # noqa: PLC0415
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415

    serve.start(proxy_location="Disabled")
    app = serve.status().applications.get(APP_NAME)
    before = ray.get(_get_global_client()._controller.get_app_configs.remote()).get(APP_NAME)
    try:
        _deploy(ServeDeploySchema.model_validate(configuration))
    except ConfigError as error:
        if app is None or app.status != "RUNNING":
            raise
        _deploy(ServeDeploySchema(proxy_location="Disabled", applications=[before]))
        raise ConfigError(f"{error.message}; what was there before goes on", param=error.param) from error


def _deploy(configuration: Any) -> None:
    """Have Serve bring about what the configuration says, and wait until it has.

    Raises:
        ConfigError: it cannot, with what Serve says of it, or not in time.
    """
    from ray import serve  # noqa: PLC0415
    from ray.serve.context import _get_global_client  # noqa: PLC0415

    _get_global_client().deploy_apps(configuration)
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        app = serve.status().applications[APP_NAME]
        if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ConfigError(f"the cluster does not come up: {why_not(app)}")
        if app.status == "RUNNING" and all(_status().values()):
            return
        time.sleep(0.2)
    raise ConfigError(f"the cluster is not up after {READY_SECONDS:.0f} s: {why_not(app)}")
