"""Where the events of a stream go, from wherever they are made."""

from __future__ import annotations

from asyncio import Transport
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class Room(Protocol):
    """What is known of a sink by those who make what is put into it.

    Attributes:
        coalesces: whether tokens that waited because it was not ready come in one event.
    """

    coalesces: bool

    @property
    def is_ready(self) -> bool:
        """Whether more may be put into it now, wherever that is; else only by whoever waits for `flush` then."""

    async def flush(self) -> None:
        """Have what was put be sent, or wait until there is room for more."""


class Sink(Room, Protocol):
    """Takes events as they are made."""

    def put(self, events: list[bytes]) -> None: ...


class Open:
    """The part of a sink that takes all that comes."""

    coalesces = is_ready = True

    async def flush(self) -> None: ...


Work = Callable[[Sink], Coroutine[Any, Any, None]]  # makes events


def poured(events: AsyncGenerator[list[bytes], None]) -> Work:
    """The work that puts what a generator yields."""

    async def work(sink: Sink) -> None:
        async with aclosing(events):
            async for some in events:
                sink.put(some)
                await sink.flush()

    return work


class BodyWriter:
    """Writes parts of a stream's body at once, past the layers of ASGI, which would cost anew with each token."""

    def __init__(self, cycle: RequestResponseCycle, transport: Transport) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = transport

    @property
    def is_ready(self) -> bool:
        """Whether the client reads as fast as it is written to."""
        return not self._flow.write_paused

    def write(self, body: bytes) -> None:
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    async def drain(self) -> None:
        await self._flow.drain()
