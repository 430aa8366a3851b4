"""Serves, from the start of a server to its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from types import FrameType

import uvicorn

from shoal.server.app import create_app
from shoal.server.batches.runner import BatchRunner
from shoal.server.browsers import is_local
from shoal.server.connections import RESERVED_DESCRIPTORS, Connection
from shoal.server.descriptors import descriptor_limit
from shoal.server.engine.child import EngineProcess
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import Ready
from shoal.server.engine.router import Router
from shoal.server.engine.share import give_way, share
from shoal.server.engine.supervisor import EngineSupervisor
from shoal.server.metrics import Metrics
from shoal.server.service import Service
from shoal.server.settings import ServerConfig, Settings
from shoal.server.setup import build_service

logger = logging.getLogger("shoal")

STATISTICS_SECONDS = 10.0
CLOSE_SECONDS = 2.0  # after a drain, in which clients may read the ends of their answers


async def serve(settings: Settings, listener: socket.socket, engines: Sequence[EngineProcess], began: float) -> None:
    """Serve on a socket that listens until a signal ends it.

    Args:
        engines: their processes, which may still load the model.
        began: when the command did, by the monotonic clock.

    Raises:
        CheckpointError, ConfigError: it cannot start.
    """
    service, engine = build_service(settings)
    warn_of_strangers(settings.server.host, service.api_keys)
    gc.freeze()  # what is loaded stays; no collection need look at it again
    gc.enable()
    give_way(to_engines=True)
    own = [share(settings, number) for number in range(len(engines))]
    supervisors = [EngineSupervisor(*each) for each in zip(own, service.clients, engines, strict=True)]
    runner = BatchRunner(service)
    server = GracefulServer(service, engine, runner)
    serving = asyncio.create_task(server.serve([listener]))
    starting = asyncio.gather(*(supervisor.start() for supervisor in supervisors))
    runner.start()

    async def prepare() -> None:
        await asyncio.wait((starting,))
        await service.constraints.prepare(lambda: engine.num_unfinished == 0)

    preparing = asyncio.create_task(prepare())
    statistics = asyncio.create_task(log_statistics(service.metrics, STATISTICS_SECONDS))
    try:
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            ready, *_ = starting.result()
            if not server.should_exit:  # else it is closing already
                _announce(service, ready, listener, time.monotonic() - began)
        await serving
    finally:
        server.should_exit = True
        for task in (preparing, statistics, starting):
            task.cancel()
        await runner.stop()
        await asyncio.gather(*(supervisor.stop() for supervisor in supervisors))
        await service.templates.close()
        await asyncio.gather(serving, starting, preparing, statistics, return_exceptions=True)
        await service.batches.close()
        if service.tracer is not None:
            await service.tracer.close()
        logger.info("stopped after %.1f s", time.monotonic() - began)


def warn_of_strangers(host: str, api_keys: Collection[str]) -> None:
    """Log a line if everybody who reaches this machine may use the server."""
    if not (api_keys or is_local(host)):
        message = (
            "host %s without API keys: everybody who reaches this machine may use it; set api_keys_file or api_keys"
        )
        logger.warning(message, host)


def _limited(config: ServerConfig) -> type[Connection]:
    """Connections with the limits of these settings, and of this process."""
    limits = {
        "max_connections": descriptor_limit() - RESERVED_DESCRIPTORS,
        "request_seconds": config.client_timeout_seconds,
    }
    return type("LimitedConnection", (Connection,), limits)


class GracefulServer(uvicorn.Server):
    """Lets unfinished requests go on for a while after a signal, and answers the rest with a typed error."""

    def __init__(self, service: Service, engine: EngineClient | Router, runner: BatchRunner) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=_limited(service.settings.server),
                lifespan="off",
                log_config=None,
                access_log=service.settings.server.access_log,
                timeout_graceful_shutdown=5,
                ssl_certfile=service.settings.server.ssl_certfile,
                ssl_keyfile=service.settings.server.ssl_keyfile,
            )
        )
        self._engine = engine
        self._logs = service.engine.logs
        self._runner = runner
        self._drain_seconds = service.settings.server.drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._runner.stop()
        for log in self._logs:
            log.close()
        if self._engine.num_unfinished:
            logger.info("draining %d unfinished requests", self._engine.num_unfinished)
        draining = asyncio.create_task(self._engine.drain(self._drain_seconds))
        while not draining.done() and not self.force_exit:
            await asyncio.wait((draining,), timeout=0.1)
        draining.cancel()
        self._engine.close()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CLOSE_SECONDS)
        for connection in list(self.server_state.connections):
            assert isinstance(connection, Connection)
            connection.cut_off()
        for task in self.server_state.tasks:
            task.cancel()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal drains the server; a second one, whichever it is, ends the drain."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, and a terminal that closes drains too.

        The signal is not raised again afterwards: the exit code of a drained server is 0.
        """
        with super().capture_signals():
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
                signal.signal(signal.SIGHUP, self.handle_exit)
            yield
            self._captured_signals.clear()


async def log_statistics(metrics: Metrics, seconds: float) -> None:
    """Log a line of statistics at this interval, whenever anything was done in it."""
    before = metrics.totals()
    while True:
        await asyncio.sleep(seconds)
        now = metrics.totals()
        rates = {name: (now[name] - before[name]) / seconds for name in now}
        drafted, queries = rates["spec_decode_num_draft_tokens"], rates["prefix_cache_queries"]
        parts = [
            f"running {now['num_requests_running']:.0f}",
            f"waiting {now['num_requests_waiting']:.0f}",
            f"prompt {rates['prompt_tokens']:.0f} tokens/s",
            f"generation {rates['generation_tokens']:.0f} tokens/s",
            f"KV cache {now['kv_cache_usage_perc']:.0%}",
        ]
        if queries:
            parts.append(f"prefix cache hits {rates['prefix_cache_hits'] / queries:.0%}")
        if drafted:
            parts.append(f"drafts accepted {rates['spec_decode_num_accepted_tokens'] / drafted:.0%}")
        if rates["num_preemptions"]:
            parts.append(f"preemptions {rates['num_preemptions'] * seconds:.0f}")
        if now["num_requests_running"] or now["num_requests_waiting"] or rates["generation_tokens"]:
            logger.info("%s", ", ".join(parts))
        before = now


def _announce(service: Service, ready: Ready, listener: socket.socket, seconds: float) -> None:
    host, port = listener.getsockname()[:2]
    limits = ready.limits
    num_engines = len(service.clients)
    each = "" if num_engines == 1 else f", on each of {num_engines} engines"
    logger.info(
        "model %s: %.1f M parameters, %s%s", service.model_name, ready.num_parameters / 1e6, ready.backend, each
    )
    if ready.warning is not None:
        logger.warning("%s", ready.warning)
    logger.info(
        "KV cache: %d blocks of %d tokens, %d MiB; requests up to %d tokens, %d at once, policy %s",
        limits.num_blocks,
        limits.block_size,
        ready.kv_cache_bytes // 2**20,
        limits.max_model_len,
        limits.max_num_seqs,
        service.settings.scheduler.policy,
    )
    scheme = "http" if service.settings.server.ssl_certfile is None else "https"
    logger.info("ready after %.1f s: %s://%s:%d", seconds, scheme, f"[{host}]" if ":" in host else host, port)
