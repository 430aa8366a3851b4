"""Engine processes of a cluster, without Ray: started, joined over TCP, killed and replaced."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from shoal.cluster.fleet import Fleet
from shoal.cluster.host import EngineHost
from shoal.cluster.messages import Endpoint
from shoal.cluster.secret import Keys
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.output import SamplingParams
from shoal.server.engine.messages import EngineRequest
from shoal.server.engine.router import Router
from shoal.server.settings import Settings, resolve
from shoal.server.setup import build_service, make_client

SECRET, PATIENCE = "a secret of the test", 280.0


def settings_of(folder: Path, num_blocks: int = 512) -> Settings:
    return resolve({"model": str(folder), "engine": {"threads": 1}, "cache": {"num_blocks": num_blocks}})


@asynccontextmanager
async def cluster(settings: Settings, count: int) -> AsyncIterator[Router]:
    """A router that is joined to engines, each run by a host."""
    service, router = build_service(settings, 0)
    assert isinstance(router, Router)
    make = partial(make_client, settings=settings, metrics=service.metrics)
    fleet = Fleet(router, make, Keys.of(SECRET), service.fingerprint)
    listed: dict[str, Endpoint] = {}

    def tell(replica: str, endpoint: Endpoint | None) -> None:
        listed.pop(replica, None)
        listed.update({replica: endpoint} if endpoint else {})
        fleet.update(listed.values())

    names = [f"r{number}" for number in range(count)]
    hosts = [EngineHost(settings, name, "127.0.0.1", SECRET, partial(tell, name)) for name in names]
    running = [asyncio.create_task(host.run()) for host in hosts]
    try:
        await until(lambda: num_connected(router) == count)
        yield router
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await fleet.close()
        await service.templates.close()
        await service.batches.close()


def num_connected(router: Router) -> int:
    return sum(client.is_connected for client in router.clients)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 (what changes is in another's keeping)
            await asyncio.sleep(0.01)


async def tokens(router: Router, name: str) -> list[int]:
    """What comes of a request that is the same for each name that ends alike."""
    params = SamplingParams(max_tokens=300, seed=ord(name[-1]))
    submission = router.submit([EngineRequest(name, [1, 2, ord(name[-1])], params)])
    found: list[int] = []
    while True:
        for output in await submission.get():
            found += output.token_ids
            if output.finish_reason is not None:
                return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_go_on_at_another_engine_to_the_bit(tiny_folder: Path, how: signal.Signals) -> None:
    async def scene() -> None:
        async with cluster(settings_of(tiny_folder), 2) as router:
            undisturbed = [await tokens(router, name) for name in "abcd"]
            asked = [asyncio.create_task(tokens(router, f"again-{name}")) for name in "abcd"]
            await until(lambda: all(journal.output_token_ids for journal in router.journals()))
            victim = router.clients[0]
            pid = victim.ready.pid
            os.kill(pid, how)
            await until(lambda: not victim.is_connected or all(task.done() for task in asked))
            assert await asyncio.gather(*asked) == undisturbed
            if how is signal.SIGSTOP:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: num_connected(router) == 2 and victim.ready.pid != pid)
            assert await tokens(router, "later-a") == undisturbed[0]

    asyncio.run(scene())


def test_an_engine_that_cannot_start_says_why(tiny_folder: Path) -> None:
    async def scene() -> None:
        host = EngineHost(settings_of(tiny_folder, 10**9), "r", "127.0.0.1", SECRET, lambda endpoint: None)
        with pytest.raises(ConfigError, match="num_blocks: a KV cache of 1000000000 blocks takes"):
            await host.run()

    asyncio.run(scene())
