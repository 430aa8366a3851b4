"""The engine's end of the connections to all API processes of a cluster."""

from __future__ import annotations

import logging
from collections import defaultdict
from math import ceil

import msgspec
import zmq

from shoal.cluster.messages import Hello, ToEngine, Welcome
from shoal.cluster.secret import Keys
from shoal.scheduler.output import RequestOutput
from shoal.server.engine.messages import Abort, Command, ForgetPrefixes, News, Report, Submit
from shoal.server.engine.packing import decode_hook

logger = logging.getLogger("shoal.cluster")

HEARTBEAT_MS, SILENCE_MS = 100, 300  # a peer whose thread of zmq does not answer for so long is gone

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine, dec_hook=decode_hook)


class Gateway:
    """Implements `Wire` for the engine's loop, with any number of API processes behind it.

    Each of them is told what comes of its own requests, and how loaded the engine is.  The requests of one that is gone
    are aborted.

    Args:
        host: on which to listen, at a free port.
        welcome: says what the engine is.

    Attributes:
        port: at which it listens.
    """

    def __init__(self, host: str, keys: Keys, welcome: Welcome) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        keys.guard_engine(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # what cannot be sent is an error
        self._socket.set_hwm(0)
        watch_peers(self._socket)
        self.port: int = self._socket.bind_to_random_port(f"tcp://{host}")
        self._welcome = welcome
        self._peers: set[bytes] = set()
        self._owners: dict[str, bytes] = {}  # by the id of a request
        self._orphans: list[str] = []  # requests whose peers are gone

    def send(self, report: Report) -> None:
        assert isinstance(report, News)
        self._welcome.stats = report.stats
        outputs: dict[bytes, list[RequestOutput]] = defaultdict(list)
        for output in report.outputs:
            owner = self._owners.get(output.request_id)
            if owner is not None:
                outputs[owner].append(output)
                if output.finish_reason is not None:
                    del self._owners[output.request_id]
        for peer in list(self._peers):
            self._send(peer, News(outputs[peer], report.stats, report.step))

    def receive(self, seconds: float | None) -> list[Command]:
        if seconds != 0:
            self._socket.poll(None if seconds is None else ceil(seconds * 1000))
        commands: list[Command] = []
        while True:
            try:
                peer, message = self._socket.recv_multipart(zmq.NOBLOCK)
                commands += self._take(peer, _decoder.decode(message))
            except zmq.Again:
                break
            except (ValueError, msgspec.MsgspecError) as error:
                logger.warning("a message that nobody understands: %s", error)
        orphans, self._orphans = self._orphans, []
        return [*commands, Abort(orphans)] if orphans else commands

    def _take(self, peer: bytes, message: ToEngine) -> list[Command]:
        match message:
            case Hello():
                self._peers.add(peer)
                self._send(peer, self._welcome)
            case Submit(requests):
                # One that came over a connection which has broken since comes again.
                again = [request.request_id for request in requests if request.request_id in self._owners]
                self._owners |= {request.request_id: peer for request in requests}
                return [Abort(again), message] if again else [message]
            case Abort(request_ids):
                own = [one for one in request_ids if self._owners.get(one) == peer]
                for request_id in own:
                    del self._owners[request_id]
                return [Abort(own)]
            case ForgetPrefixes():
                return [message]
        return []  # nobody can watch from afar

    def _send(self, peer: bytes, message: object) -> None:
        try:
            self._socket.send_multipart([peer, _encoder.encode(message)])
        except zmq.ZMQError:  # it is gone
            self._peers.discard(peer)
            for request_id in [one for one, owner in self._owners.items() if owner == peer]:
                del self._owners[request_id]
                self._orphans.append(request_id)


def watch_peers(socket: zmq.Socket[bytes]) -> None:
    """Have a connection end soon after the other end is gone, or cannot be reached any more."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, SILENCE_MS)
