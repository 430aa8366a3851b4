"""An API process's end of its connection to one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import version

import msgspec
import zmq
from msgspec.structs import replace
from zmq.utils.monitor import recv_monitor_message

from shoal.cluster.gateway import watch_peers
from shoal.cluster.messages import Endpoint, FromEngine, Hello, Welcome
from shoal.cluster.secret import Keys
from shoal.scheduler.errors import EngineError
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import News
from shoal.server.engine.outbox import Outbox
from shoal.server.engine.packing import encode_hook

WELCOME_SECONDS = 10.0  # in which an engine answers
LOOK_SECONDS = 0.1  # how often it is looked whether an engine hangs

_encoder = msgspec.msgpack.Encoder(enc_hook=encode_hook)
_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


class Link:
    """A connection, which lasts until something breaks it.

    Args:
        fingerprint: that the engine must have, so that its tokens are those of the others.
        machine: address of this one; a process elsewhere cannot be looked at, and has no number here.
    """

    def __init__(
        self, endpoint: Endpoint, client: EngineClient, keys: Keys, fingerprint: str, machine: str = ""
    ) -> None:
        self._address = endpoint.address
        self._client = client
        self._fingerprint = fingerprint
        self._is_near = endpoint.address.startswith(f"tcp://{machine}:")
        self._outbox = Outbox()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        keys.guard_api(self._socket)
        self._socket.set_hwm(0)
        watch_peers(self._socket)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket()

    async def run(self) -> None:
        """Have the client work with the engine until the connection ends.

        Raises:
            EngineError: how it ended, or why there was none.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.FD, self._guard, self._receive)
        loop.add_reader(self._monitor.FD, self._guard, self._see)
        delivering = asyncio.create_task(self._deliver())
        deadline = loop.time() + WELCOME_SECONDS
        try:
            self._socket.connect(self._address)
            self._post(Hello())
            self._guard(self._see)  # a descriptor tells only of what comes once nothing was left
            while not (self._ended.done() or delivering.done()):
                await asyncio.wait((self._ended, delivering), timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not self._client.is_connected and loop.time() > deadline:
                    raise EngineError(f"the engine at {self._address} does not answer")
                if self._client.hangs:
                    raise EngineError(f"the engine at {self._address} hangs: it completes no step, though it has work")
            for ended in (self._ended, delivering):
                if ended.done():
                    ended.result()
        finally:
            delivering.cancel()
            loop.remove_reader(self._socket.FD)
            loop.remove_reader(self._monitor.FD)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            if self._client.is_connected:
                self._client.lose()

    async def _deliver(self) -> None:
        while True:
            self._post(await self._outbox.get())
            await asyncio.sleep(0)

    def _post(self, message: object) -> None:
        self._socket.send(_encoder.encode(message))
        self._guard(self._receive)  # the socket's descriptor would not tell again of what came meanwhile

    def _guard(self, work: Callable[[], None]) -> None:
        """Do this until nothing is left to be taken; an error ends the connection."""
        try:
            while not self._ended.done():
                work()
        except zmq.Again:
            pass
        except Exception as error:
            self._ended.set_exception(error)

    def _receive(self) -> None:
        match _decoder.decode(self._socket.recv(zmq.NOBLOCK)):
            case News() as news if self._client.is_connected:
                self._client.take(news)
            case Welcome() as welcome:
                self._check(welcome)
                ready = welcome.ready if self._is_near else replace(welcome.ready, pid=0)
                self._client.connect(ready, self._outbox.put, welcome.stats)

    def _check(self, welcome: Welcome) -> None:
        for what, its, ours in (
            ("version", welcome.version, version("shoal")),
            ("fingerprint", welcome.fingerprint, self._fingerprint),
        ):
            if its != ours:
                raise EngineError(f"the engine at {self._address} has {what} {its}, and this server {ours}")

    def _see(self) -> None:
        """Take what is told of the connection."""
        event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
        if event == zmq.EVENT_CONNECT_RETRIED:
            raise EngineError(f"nobody listens at {self._address}")
        if event == zmq.EVENT_DISCONNECTED or event & zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            known = self._client.is_connected
            why = "is gone" if known else "does not know this cluster's secret, or is none of Shoal's"
            raise EngineError(f"the engine at {self._address} {why}")
