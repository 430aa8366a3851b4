"""How those who watch an engine learn of its steps: the API process's end, which keeps the last minutes meanwhile."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from secrets import token_hex

import msgspec

from shoal.scheduler.config import SchedulerConfig
from shoal.server.engine.events import Seen, StepEvent, UsePolicy, UsesPolicy, Watch
from shoal.server.engine.messages import Ready, Sendable

KEPT_SECONDS, KEPT_BYTES = 180.0, 16 * 1024 * 1024
LINGER_SECONDS = 10.0  # that the engine is watched when nobody looks any more: a page may only be loaded again
MAX_AT_ONCE = 64  # events that are handed out together
SWITCH_SECONDS = 2.0  # in which an idle engine changes its policy

_encode = msgspec.json.Encoder().encode


class Snapshot(msgspec.Struct):
    """Where a stream begins, or goes on after an engine that died.

    Attributes:
        at: seconds since 1970, on the server's clock.
        num_engines: that there were so far; one that takes over from another counts steps from 0 again.
        limits: that the engine keeps; None while there is none.
    """

    at: float
    num_engines: int
    limits: SchedulerConfig | None


class Lost(msgspec.Struct):
    """The engine is gone; another one takes its place."""

    at: float


class SeenStep(msgspec.Struct):
    """What an engine did: the first fields are when it was told, and the number of the engine."""

    at: float
    engine: int
    step: StepEvent


class EventLog:
    """What an engine tells of its steps, for any number of those who watch.

    The engine tells while somebody watches, and what it told in the last minutes is kept meanwhile.  Each event has an
    id, `LOG:NUMBER`, from which whoever was cut off goes on; numbers go on from one engine to the next.

    Args:
        clock: returns seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.policy = ""  # that the engine was told to use, if it was
        self._clock = clock
        self._name = token_hex(4)
        self._kept: deque[tuple[float, bytes]] = deque()
        self._num_bytes = 0
        self._end = 1  # the number of the next event
        self._limits: SchedulerConfig | None = None
        self._num_engines = 0
        self._send: Callable[[Sendable], None] | None = None
        self._num_watching = 0
        self._is_on = self._is_closed = False
        self._changed = asyncio.Event()
        self._used = asyncio.Event()

    # -- for the engine's client -----------------------------------------------------------------------------------

    def connect(self, ready: Ready, send: Callable[[Sendable], None]) -> None:
        """An engine is ready, and takes commands through `send`."""
        self._limits, self._send, self.policy = ready.limits, send, ""
        self._num_engines += 1
        if self._is_on:
            self._add(b"snapshot", _encode(self._snapshot()))
            send(Watch(True))

    def lose(self) -> None:
        """The engine is gone."""
        self._limits = self._send = None
        if self._is_on:
            self._add(b"lost", _encode(Lost(self._clock())))

    def take(self, seen: Seen | UsesPolicy) -> None:
        """The engine tells of its steps, or of the policy that it uses now."""
        match seen:
            case Seen(event):
                self._add(b"step", b'{"at":%.3f,"engine":%d,"step":%b}' % (self._clock(), self._num_engines, event))
            case UsesPolicy(policy):
                self.policy = policy
                self._used.set()

    # -- for those who watch ---------------------------------------------------------------------------------------

    async def follow(self, last_event_id: str = "") -> AsyncGenerator[list[bytes], None]:
        """The events as they are sent: a snapshot, what is kept, and then what comes.

        Args:
            last_event_id: of the event that was read last: if what follows it is kept, that comes, and no snapshot.
        """
        with self._watching():
            named = re.fullmatch(rf"{self._name}:(\d{{1,15}})", last_event_id)
            at = int(named[1]) + 1 if named else 0
            while not self._is_closed:
                first = self._end - len(self._kept)
                some: list[bytes] = []
                if not first <= at <= self._end:
                    at = first
                    some.append(self._made(at - 1, b"snapshot", _encode(self._snapshot())))
                some += [event for _, event in islice(self._kept, at - first, at - first + MAX_AT_ONCE)]
                at = min(at + MAX_AT_ONCE, self._end)
                if some:
                    yield some
                else:
                    await self._changed.wait()

    def tell_singly(self, num_steps: int) -> None:
        """Have the engine tell of its next steps one by one, if somebody watches."""
        if self._is_on and self._send is not None:
            self._send(Watch(True, num_steps))

    async def use_policy(self, policy: str) -> bool:
        """Have the engine schedule by this policy; False if it has work, or there is none."""
        if self._send is None:
            return False
        self._used.clear()
        self._send(UsePolicy(policy))
        try:
            await asyncio.wait_for(self._used.wait(), SWITCH_SECONDS)
        except TimeoutError:
            return False
        return self.policy == policy

    def close(self) -> None:
        """End all streams."""
        self._is_closed = True
        self._changed.set()  # and nothing waits any more

    # -- the parts -------------------------------------------------------------------------------------------------

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self._num_watching += 1
        self._turn(True)
        try:
            yield
        finally:
            self._num_watching -= 1
            if not self._num_watching:
                asyncio.get_running_loop().call_later(LINGER_SECONDS, self._rest)

    def _rest(self) -> None:
        if not self._num_watching:
            self._turn(False)

    def _turn(self, is_on: bool) -> None:
        """Have the engine tell, or be silent, if that is new; nothing is kept of before."""
        if is_on == self._is_on:
            return
        self._is_on = is_on
        self._kept.clear()
        self._num_bytes = 0
        if self._send is not None:
            self._send(Watch(is_on))

    def _snapshot(self) -> Snapshot:
        return Snapshot(round(self._clock(), 3), self._num_engines, self._limits)

    def _made(self, number: int, name: bytes, data: bytes) -> bytes:
        return b"id: %b:%d\nevent: %b\ndata: %b\n\n" % (self._name.encode(), number, name, data)

    def _add(self, name: bytes, data: bytes) -> None:
        """Keep an event, forget what is too old or too much, and wake those who watch."""
        if not self._is_on:
            return
        now = self._clock()
        event = self._made(self._end, name, data)
        self._kept.append((now, event))
        self._end += 1
        self._num_bytes += len(event)
        while self._kept and (self._num_bytes > KEPT_BYTES or self._kept[0][0] < now - KEPT_SECONDS):
            self._num_bytes -= len(self._kept.popleft()[1])
        self._changed.set()
        self._changed = asyncio.Event()
