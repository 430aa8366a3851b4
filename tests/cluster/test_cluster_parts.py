"""The parts of a cluster that need neither Ray nor sockets: the directory, the policy of scaling, the command line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import shoal.cluster.directory as directory_module
from shoal.cli import main
from shoal.cluster.autoscaling import autoscale
from shoal.cluster.cli import why_not
from shoal.cluster.directory import LISTED_SECONDS, Directory
from shoal.cluster.messages import Endpoint, Load, Standing
from shoal.scheduler.autoscaling import KV_CACHE_USAGE, QUEUE_SECONDS, needed
from shoal.scheduler.errors import ConfigError
from shoal.server.wire.responses import Cluster, ClusterEngine, ClusterServer
from tests.test_rooms import ROOT


def standing(replica: str, number: int | None = None, **fields: Any) -> Standing:
    fields = {"address": f"tcp://{replica}:1", "fingerprint": "fp", **fields}
    return Standing(replica, "a node", number=number, **fields)


def test_the_directory_lists_who_was_heard_of_lately() -> None:
    async def scene() -> None:
        now = [0.0]
        directory = Directory(lambda: now[0])
        server = ClusterServer("s", "a node", "http://s")
        await directory.tell_engine(standing("a"))
        await directory.tell_server(server)
        now[0] = LISTED_SECONDS - 1
        await directory.tell_engine(standing("b", load=Load(1.5, 0.25, 3)))
        one, other = (Endpoint(name, f"tcp://{name}:1", "fp", number) for number, name in enumerate("ab"))
        assert await directory.engines() == [one, other]
        assert (await directory.describe()).servers == [server]
        now[0] = LISTED_SECONDS
        told = ClusterEngine("1", "b", "a node", True, "tcp://b:1", "fp", 3, 1.5, 0.25)
        assert await directory.engines() == [other]
        assert await directory.describe() == Cluster([told], [])
        await directory.tell_engine(standing("b", address=None))
        assert await directory.engines() == []
        (down,) = (await directory.describe()).engines
        assert (down.engine, down.is_ready) == ("1", False)
        await directory.leave("b")
        assert (await directory.describe()).engines == []

    asyncio.run(scene())


def test_a_replica_keeps_its_number_and_no_two_have_the_same() -> None:
    async def scene() -> None:
        directory = Directory()
        assert [await directory.tell_engine(standing(name)) for name in "abc"] == [0, 1, 2]
        await directory.leave("b")
        assert [await directory.tell_engine(standing(name)) for name in "cda"] == [2, 1, 0]
        another = Directory()  # started anew, it is told who had which
        assert [await another.tell_engine(standing(name, number)) for name, number in (("c", 2), ("a", 0))] == [2, 0]
        assert await another.tell_engine(standing("e")) == 1
        assert await another.tell_engine(standing("d", 1)) == 3

    asyncio.run(scene())


def test_the_directory_tells_of_changes_at_once_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "WATCH_SECONDS", 0.05)

    async def scene() -> None:
        directory = Directory()
        endpoint = Endpoint("a", "tcp://a:1", "fp", 0)
        number, found = await directory.watch(-1)
        assert found == []
        watching = asyncio.create_task(directory.watch(number))
        await asyncio.sleep(0)
        await directory.tell_engine(standing("a"))
        later, found = await watching
        assert later != number
        assert found == [endpoint]
        await directory.tell_engine(standing("a", 0, load=Load(1.0)))
        assert await directory.watch(later) == (later, [endpoint])

    asyncio.run(scene())


@given(st.integers(1, 100), st.floats(0, 100), st.floats(0, 1))
def test_the_needed_engines_bring_the_means_to_what_they_should_be(count: int, age: float, usage: float) -> None:
    number = needed(count, age, usage)
    assert age * count / number <= QUEUE_SECONDS * 1.0001
    assert usage * count / number <= KV_CACHE_USAGE * 1.0001
    assert number == 1 or max(age / QUEUE_SECONDS, usage / KV_CACHE_USAGE) * count / (number - 1) > 0.9999


def test_the_policy_goes_by_the_means_and_changes_nothing_while_nothing_is_known() -> None:
    def context(metrics: dict[str, dict[str, float]] | None) -> SimpleNamespace:
        return SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=2, target_num_replicas=3)

    assert autoscale(context(None)) == (3, {})
    assert autoscale(context({"queue_seconds": {}, "kv_cache_usage": {}})) == (3, {})
    assert autoscale(context({"queue_seconds": {"a": 2, "b": 4}, "kv_cache_usage": {"a": 0.1, "b": 0.1}})) == (6, {})
    assert autoscale(context({"queue_seconds": {"a": 0, "b": 0}, "kv_cache_usage": {"a": 0.2, "b": 0.2}})) == (1, {})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["up", "--replicas", "0"], "0 is not in the range"),
        (["up", "--secret-file", "nowhere"], "does not exist"),
    ],
)
def test_wrong_options_are_named(args: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["cluster", *args])
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_ray_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cluster.cli.find_spec", lambda name: None)
    for command in ("up", "status", "down"):
        result = CliRunner().invoke(main, ["cluster", command])
        assert result.exit_code == 2
        assert "Ray is not installed" in result.stderr


def test_why_a_cluster_does_not_come_up_is_what_its_replicas_said() -> None:
    def deployment(status: str, message: str) -> SimpleNamespace:
        return SimpleNamespace(status=status, message=message)

    trace = "The deployment failed.  Error:\n  File a.py\nshoal.scheduler.errors.ConfigError: num_blocks: too many\n"
    failed, well = deployment("DEPLOY_FAILED", trace), deployment("HEALTHY", "")
    app = SimpleNamespace(message="Failed to update the deployments", deployments={"engine": failed, "ingress": well})
    assert why_not(app) == "num_blocks: too many"
    app.deployments["engine"] = deployment("UPDATING", "no node has room")
    assert why_not(app) == "no node has room"
    app.deployments["engine"] = deployment("UNHEALTHY", "")
    assert why_not(app) == "Failed to update the deployments"


@pytest.mark.filterwarnings("ignore")  # Ray has some at its import
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:no"])
def test_an_address_at_which_nobody_answers_is_named_at_once(address: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make test-cluster installs it")
    result = CliRunner().invoke(main, ["cluster", "status", "--address", address])
    assert result.exit_code == 2
    assert f"no Ray cluster answers at {address}" in result.stderr


@pytest.mark.filterwarnings("ignore")  # Ray has some at its import
def test_serve_takes_the_configurations(tmp_path: Path) -> None:
    """Its own schema, of what `up` deploys and of the manifest."""
    pytest.importorskip("ray", reason="Ray is not installed: make test-cluster installs it")
    from ray.serve.schema import ServeDeploySchema  # noqa: PLC0415

    from shoal.cluster.app import configure, plan  # noqa: PLC0415

    numbers: dict[str, Any] = {"replicas": 1, "ingresses": 2, "num_cpus": 1.0, "num_gpus": 0.0}
    for most in (1, 4):
        ServeDeploySchema.model_validate(configure("shoal", {}, max_replicas=most, **numbers))
    service, _ = yaml.safe_load_all((ROOT / "deploy/rayservice.yaml").read_text("utf-8"))
    ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    file = tmp_path / "secret"
    file.write_text("a secret of the test\n")
    assert plan({"secret_file": str(file)}) == plan({"secret": "a secret of the test"})
    for args, param in (
        ({"secret_file": "nowhere"}, "secret_file"),
        ({"secret": "short"}, "secret"),
        ({"secret": "a secret of the test", "replicas": 2}, "replicas"),
        ({"secret": "a secret of the test", "settings": {"engine": {"engines": 2}}}, "engines"),
    ):
        with pytest.raises(ConfigError) as error:
            plan(args)
        assert error.value.param == param
