"""From settings to a running server, and down again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import uvicorn

from shoal.model.checkpoint.config import load_config, load_generation_defaults
from shoal.model.checkpoint.find import checkpoint_name, resolve_checkpoint
from shoal.model.checkpoint.format import open_checkpoint
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import CheckpointError, ConfigError
from shoal.scheduler.policies import find_policy
from shoal.server.app import create_app
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import EngineConfig, Ready
from shoal.server.engine.tracing import begin_trace
from shoal.server.metrics import Metrics
from shoal.server.service import Service, unix_time
from shoal.server.settings import Settings

logger = logging.getLogger("shoal")


async def serve(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        CheckpointError, ConfigError: it cannot start.
    """
    began = time.monotonic()
    find_policy(settings.scheduler.policy)
    checkpoint = resolve_checkpoint(settings.model)
    listener = listen(settings.server.host, settings.server.port)
    with contextlib.closing(listener):
        service = build_service(settings, checkpoint)
        if settings.engine.trace is not None:
            begin_trace(settings.engine.trace)
        server = GracefulServer(service)
        serving = asyncio.create_task(server.serve([listener]))
        starting = asyncio.create_task(service.engine.start())
        try:
            await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                ready = starting.result()
                if not server.should_exit:  # else it is closing already
                    _announce(service, ready, listener, time.monotonic() - began)
            await serving
        finally:
            server.should_exit = True
            starting.cancel()
            await service.engine.stop()
            await asyncio.gather(serving, starting, return_exceptions=True)


def build_service(settings: Settings, checkpoint: Path) -> Service:
    """Read what the API process needs of the checkpoint; the engine process reads the rest.

    Raises:
        CheckpointError: a file is missing or malformed.
        ConfigError: the draft model has another tokenizer.
    """
    opened, engine = open_checkpoint(checkpoint), engine_config(settings, checkpoint)
    tokenizer = Tokenizer.load(opened)
    if engine.draft_checkpoint is not None:
        _check_draft(tokenizer, Path(engine.draft_checkpoint))
    model_name = settings.server.served_model_name or checkpoint_name(settings.model, checkpoint)
    metrics = Metrics(model_name)
    return Service(
        settings=settings,
        model_name=model_name,
        config=load_config(opened),
        defaults=load_generation_defaults(opened),
        tokenizer=tokenizer,
        engine=EngineClient(engine, metrics),
        metrics=metrics,
        started=unix_time(),
    )


def engine_config(settings: Settings, checkpoint: Path) -> EngineConfig:
    """What the engine process is told of the settings.

    Raises:
        CheckpointError: there is no such draft model.
    """
    speculation, trace = settings.speculation, settings.engine.trace
    return EngineConfig(
        checkpoint=str(checkpoint),
        **settings.engine.model_dump(exclude={"trace"}),
        trace=None if trace is None else str(trace),
        **settings.cache.model_dump(),
        **settings.scheduler.model_dump(),
        speculation=speculation.method,
        num_spec_tokens=speculation.num_spec_tokens,
        draft_checkpoint=_draft_checkpoint(speculation.draft_model) if speculation.method == "draft" else None,
        draft_layers=speculation.draft_layers,
        verification=speculation.verification,
    )


def _draft_checkpoint(name_or_path: str) -> str:
    try:
        return str(resolve_checkpoint(name_or_path))
    except CheckpointError as error:
        raise CheckpointError(f"draft_model: {error.message}", param="draft_model") from error


def _check_draft(tokenizer: Tokenizer, draft: Path) -> None:
    """A vocabulary of the same size may be another one, of which nothing would ever be accepted."""
    if not Tokenizer.load(draft).has_vocabulary_of(tokenizer):
        raise ConfigError(
            f"draft_model {draft} has another vocabulary than the model: they need the same tokenizer",
            param="draft_model",
        )


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow begins.

    Raises:
        ConfigError: it is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except UnicodeError as error:
        raise ConfigError(f"host: {host!r} is not a host name", param="host") from error
    except OSError as error:
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise ConfigError(
            f"cannot listen on host {host}, port {port}: {error.strerror}; choose another with --port or --host",
            param="port" if is_port else "host",
        ) from error
    return listener


class GracefulServer(uvicorn.Server):
    """Lets what is unfinished go on for a while after a signal, and answers the rest with a typed error."""

    def __init__(self, service: Service) -> None:
        settings = service.settings.server
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # what it says of its start, we say better
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=settings.access_log,
                timeout_graceful_shutdown=5,
            )
        )
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        unfinished = self.service.engine.num_unfinished
        if unfinished:
            logger.info("draining %d unfinished requests", unfinished)
        draining = asyncio.create_task(self.service.engine.drain(self.service.settings.server.drain_seconds))
        while not draining.done() and not self.force_exit:
            await asyncio.wait((draining,), timeout=0.1)
        draining.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but without raising the signal again afterwards: the exit code of a drained server is 0."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def _announce(service: Service, ready: Ready, listener: socket.socket, seconds: float) -> None:
    host, port = listener.getsockname()[:2]
    config = service.engine.config
    logger.info("Shoal %s serves %s", version("shoal"), service.model_name)
    logger.info("model: %.1f M parameters, %s", ready.num_parameters / 1e6, ready.description)
    if ready.warning is not None:
        logger.warning("%s", ready.warning)
    logger.info(
        "KV cache: %d blocks of %d tokens, %d MiB; requests up to %d tokens, %d at once, policy %s",
        ready.num_blocks,
        config.block_size,
        ready.kv_cache_bytes // 2**20,
        ready.max_model_len,
        config.max_num_seqs,
        config.policy,
    )
    logger.info("ready after %.1f s: http://%s:%d", seconds, f"[{host}]" if ":" in host else host, port)
