"""How rank 0, which is the engine, finds or starts the other ranks, and tells them of each step.

The others are `rank.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from msgspec.structs import replace

from shoal.model.backends.config import BackendConfig
from shoal.model.backends.split import Split
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.step.batch import ForwardBatch
from shoal.scheduler.errors import ConfigError
from shoal.server.engine.backends import PARALLEL
from shoal.server.engine.rank_secret import NONCE_BYTES, acquaint, read_secret
from shoal.server.engine.rank_wire import Hello, Loaded, RankSocket, Refused, Step, StrangerError, Welcome
from shoal.server.engine.share import threads_of_rank
from shoal.server.settings import Settings

logger = logging.getLogger("shoal.engine")

HELLO_SECONDS = 5.0  # in which whoever connects says who it is
LOOK_SECONDS = 0.2  # how often it is looked whether a rank that was started has ended
_LAST_PORT = 65535


def asked_split(config: BackendConfig) -> Split:
    """How the settings split the model."""
    return Split(config.tensor_parallel, config.expert_parallel, config.pipeline_parallel)


class Crew:
    """The other ranks, as rank 0 sees them.

    Args:
        lost: told of one that ended while it was needed.

    Attributes:
        members: their connections, by rank.
        host: address of this machine at which they reach it.
    """

    def __init__(self, settings: Settings, split: Split, lost: Callable[[str], None]) -> None:
        self.members: list[RankSocket] = []
        self.host = ""
        self._settings, self._num_needed, self._lost = settings, split.num_ranks - 1, lost
        self._secret = b""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watcher: threading.Thread | None = None
        self._is_closed = False

    def gather(self) -> None:
        """Wait until all ranks have joined, having started them if no address is set.

        Raises:
            ConfigError: they do not all join in time, or one is not fit to.
        """
        config = self._settings.engine
        checkpoint = resolve_checkpoint(self._settings.model)
        own = Hello.of(checkpoint, config.device)
        is_here = config.parallel_address is None
        self._secret = os.urandom(NONCE_BYTES) if is_here else read_secret(config.parallel_secret_file)
        with _listen(config.parallel_address) as listener:
            if is_here:
                for number in range(1, self._num_needed + 1):
                    self._processes.append(self._start(number, listener.getsockname()[1]))
            else:
                logger.warning("waiting for %d ranks at %s", self._num_needed, config.parallel_address)
            try:
                self._accept_all(listener, own)
            except ConfigError as error:
                for member in self.members:
                    member.refuse(error.message)
                raise
        self.host = self.members[0].host

    def welcome(self, first: Welcome) -> None:
        """Tell all ranks what they are to do.

        Args:
            first: what rank 1 is told.

        Raises:
            ConfigError: one has ended.
        """
        for rank, member in enumerate(self.members, 1):
            try:
                member.send(replace(first, rank=rank))
            except OSError as error:
                raise self._cannot_load(member, str(error)) from error

    def wait_loaded(self) -> None:
        """Wait until all ranks have loaded their parts; from then on their ends are told to `lost`.

        Raises:
            ConfigError: one cannot.
        """
        for member in self.members:
            match member.receive():
                case Loaded():
                    pass
                case Refused(message):
                    raise self._cannot_load(member, message)
                case _:
                    raise self._cannot_load(member, "it has ended")
        self._watcher = threading.Thread(target=self._watch, name="shoal-ranks", daemon=True)
        self._watcher.start()

    def tell(self, batch: ForwardBatch, num_layers: int | None) -> None:
        """Hand a step to the other ranks."""
        step = Step.of(batch, num_layers)
        for member in self.members:
            member.send(step)

    def close(self) -> None:
        """End the ranks, which end when their connections do."""
        self._is_closed = True
        for member in self.members:
            member.end()
        if self._watcher is not None:
            self._watcher.join()
        for member in self.members:
            member.close()
        for process in self._processes:
            process.kill()
            process.wait()

    @property
    def _param(self) -> str:
        config = self._settings.engine
        if config.parallel_address is not None:
            return "parallel_address"
        return next(name for name in PARALLEL if getattr(config, name) > 1)

    def _start(self, number: int, port: int) -> subprocess.Popen[bytes]:
        config = self._settings.engine
        device = config.device if config.device == "cpu" else f"cuda:{number}"
        command = [sys.executable, "-P", "-m", "shoal.server.engine.rank", f"127.0.0.1:{port}", self._settings.model]
        return _start_rank([*command, device, str(threads_of_rank(config)), "0"], self._secret)

    def _accept_all(self, listener: socket.socket, own: Hello) -> None:
        config = self._settings.engine
        deadline = time.monotonic() + config.parallel_wait_seconds
        while len(self.members) < self._num_needed:
            if any(process.poll() is not None for process in self._processes):
                raise ConfigError("a rank ended before it joined; it has said why", param=self._param)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{len(self.members)} of {self._num_needed} ranks joined at "
                    f"{config.parallel_address or 'this machine'} within {config.parallel_wait_seconds:g} s",
                    param=self._param,
                )
            self._accept(listener, own)

    def _accept(self, listener: socket.socket, own: Hello) -> None:
        """Take one that connects, if one does; strangers are sent away.

        Raises:
            ConfigError: it is another Shoal, or has another model.
        """
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return
        connection.settimeout(HELLO_SECONDS)
        member = RankSocket(connection)
        try:
            acquaint(member, self._secret, "engine")
            if not isinstance(hello := member.receive(), Hello):
                raise StrangerError("has ended")
        except (StrangerError, OSError) as error:
            logger.warning("%s %s, and is sent away", member.peer, error)
            member.close()
            return
        if difference := own.difference(hello):
            message = f"the rank at {member.peer} does not fit: {difference}"
            member.refuse(message)
            raise ConfigError(message, param=self._param)
        connection.settimeout(None)
        self.members.append(member)

    def _cannot_load(self, member: RankSocket, reason: str) -> ConfigError:
        rank = self.members.index(member) + 1
        return ConfigError(f"rank {rank} at {member.peer} cannot load its part: {reason}", param=self._param)

    def _watch(self) -> None:
        """Wait for the first rank that ends; they say nothing from now on."""
        with selectors.DefaultSelector() as selector:
            for rank, member in enumerate(self.members, 1):
                selector.register(member.socket, selectors.EVENT_READ, f"rank {rank} at {member.peer} has ended")
            (key, _), *_ = selector.select()
        if not self._is_closed:
            self._lost(key.data)


def _start_rank(command: list[str], secret: bytes) -> subprocess.Popen[bytes]:
    """Start the process of a rank, and give it the secret on its standard input, where no other user sees it."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(secret)
    return process


def _listen(address: str | None) -> socket.socket:
    host, _, port = (address or "127.0.0.1:0").rpartition(":")
    try:
        if int(port) > _LAST_PORT:
            raise OSError(f"port must be 0-{_LAST_PORT}")
        listener = socket.create_server((host.strip("[]"), int(port)), family=_family(host))
    except OSError as error:
        raise ConfigError(
            f"parallel_address {address}: cannot listen there: {error}", param="parallel_address"
        ) from error
    listener.settimeout(LOOK_SECONDS)
    return listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
