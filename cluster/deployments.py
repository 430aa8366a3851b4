"""What Ray Serve places, names and restarts: replicas that run an engine, and replicas that speak HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from msgspec import Struct
from msgspec.structs import replace
from ray import serve

from shoal.cluster.directory import TELL_SECONDS, Directory
from shoal.cluster.fleet import Fleet
from shoal.cluster.host import EngineHost
from shoal.cluster.ingress import ApiServer
from shoal.cluster.messages import Endpoint, Standing
from shoal.cluster.origins import DirectoryPeers
from shoal.cluster.secret import Keys
from shoal.model.checkpoint.find import find_draft, resolve_checkpoint
from shoal.model.checkpoint.format import open_checkpoint
from shoal.model.checkpoint.load import outline_checkpoint
from shoal.model.text.tokenizer import Tokenizer
from shoal.server.settings import Settings, resolve
from shoal.server.setup import make_client
from shoal.server.wire.responses import ClusterServer

logger = logging.getLogger("shoal.cluster")

NAMESPACE = "shoal"
HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone
ASK_SECONDS = 1.0  # for what the directory has to answer
RETRY_SECONDS = 1.0  # after a directory that did not answer


class Plan(Struct):
    """What all replicas of a cluster know: its settings by sections, and its secret."""

    sections: dict[str, Any]
    secret: str

    def settings(self) -> Settings:
        return resolve(self.sections)


def check_model(sections: dict[str, Any]) -> None:
    """Look at what an engine and an API process with these settings would read, without loading any weights.

    Raises:
        CheckpointError: a model is not there, or not whole.
    """
    settings = resolve(sections)
    opened = open_checkpoint(resolve_checkpoint(settings.model))
    outline_checkpoint(opened)
    Tokenizer.load(opened)
    if settings.speculation.method == "draft":
        outline_checkpoint(find_draft(settings.speculation.draft_model))


def find_directory(app_name: str) -> Any:
    """The handle of a cluster's directory, which is made if it is not there.

    It is on Ray's head, without which there is no cluster, so that no other node takes it away together with a replica.
    """
    kind = ray.remote(Directory).options(
        name=f"directory of {app_name}",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        resources={HEAD: 0.001},
        max_concurrency=1000,
    )
    return kind.remote()


class _Replica:
    """What both kinds of replicas do: work in tasks, and tell the directory again and again where they are."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self.name: str = context.replica_id.unique_id
        self.node: str = ray.get_runtime_context().get_node_id()
        self.directory = find_directory(context.app_name)
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._tasks.append(asyncio.create_task(work))
        return self._tasks[-1]

    async def ask(self, method: str, *args: Any) -> Any:
        """What the directory answers; None if it does not, in a second."""
        try:
            return await asyncio.wait_for(getattr(self.directory, method).remote(*args), ASK_SECONDS)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("the directory does not answer: %r", error)
            return None

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def check_health(self) -> None:
        """Raise what has ended a task, all of which should go on."""
        for task in self._tasks:
            if task.done():
                task.result()


class EngineReplica(_Replica):
    """Keeps one engine process running."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        """Return when the engine listens.

        Raises:
            ConfigError: it cannot start with these settings.
        """
        super().__init__()
        self._standing = Standing(self.name, self.node)
        self._changed = asyncio.Event()
        host = ray.util.get_node_ip_address()
        self._engine = EngineHost(plan.settings(), self.name, host, plan.secret, self._take)
        self.begin(self._engine.run())
        while self._standing.address is None:
            await self.check_health()
            await asyncio.sleep(0.05)
        self.begin(self._tell())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy goes by."""
        load = self._engine.load
        return {"queue_seconds": load.queue_seconds, "kv_cache_usage": load.kv_cache_usage}

    async def __del__(self) -> None:
        await self.end()
        await self.ask("leave", self.name)

    def _take(self, endpoint: Endpoint | None) -> None:
        address, fingerprint = (None, None) if endpoint is None else (endpoint.address, endpoint.fingerprint)
        self._standing = replace(self._standing, address=address, fingerprint=fingerprint)
        self._changed.set()

    async def _tell(self) -> None:
        """Tell the directory where the engine is: at once when that changes, and again and again."""
        while True:
            self._changed.clear()
            number = await self.ask("tell_engine", replace(self._standing, load=self._engine.load))
            if number is not None:
                self._standing = replace(self._standing, number=number)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), TELL_SECONDS)


class IngressReplica(_Replica):
    """Speaks HTTP at a port of its own, and has the cluster's engines behind it."""

    async def __init__(self, plan: Plan, _engines: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        """Return when it listens.

        Args:
            _engines: the handle of the engines' deployment, so that Serve deploys both.
        """
        super().__init__()
        settings = plan.settings()
        self._peers = DirectoryPeers(self.name, self.ask)
        machine = ray.util.get_node_ip_address()
        self._server = ApiServer(settings, machine, self._peers)
        service = self._server.service
        self._fleet = Fleet(
            self._server.router,
            partial(make_client, settings=settings, metrics=service.metrics),
            Keys.of(plan.secret),
            service.fingerprint,
            machine,
        )
        self.begin(self._server.run())
        self._following = self.begin(self._follow())
        self.begin(self._tell())

    async def __del__(self) -> None:
        self._following.cancel()  # an engine that came now would take new requests
        await self.ask("leave", self.name)
        await self._server.stop()
        await self._fleet.close()
        await self.end()

    async def _follow(self) -> None:
        """Learn from the directory which engines there are."""
        number = -1
        while True:
            try:
                number, endpoints = await self.directory.watch.remote(number)
                self._fleet.update(endpoints)
            except ray.exceptions.RayError as error:
                logger.warning("the directory does not answer: %s", error)
                number = -1
                await asyncio.sleep(RETRY_SECONDS)

    async def _tell(self) -> None:
        while True:
            self._fleet.check()
            is_known = await self.ask("tell_server", ClusterServer(self.name, self.node, self._server.url))
            if is_known is not None:
                await self._peers.tend(self._server.service.streams.ids, is_known=is_known)
            await asyncio.sleep(TELL_SECONDS)
