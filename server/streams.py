"""Answers that outlive the connections on which they are read.

Such an answer is made by a task of its own, and what came of it is held for those who come back, or who ask for the
same work again.  Nothing here survives a restart of the server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Set
from contextlib import aclosing
from dataclasses import dataclass, field

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.errors import (
    OPENAI,
    ErrorShape,
    IdempotencyKeyReuseError,
    NotFoundError,
    SlowClientError,
    StreamExpiredError,
)
from shoal.server.sinks import Open, Work

MAX_STREAM_BYTES = 2 * 2**20  # of one stream's events that are held; of many streams each holds its share of all
MAX_BYTES = 64 * 2**20  # of all answers together
ANSWER_BYTES = 2048  # that an answer counts as besides its events

Events = AsyncGenerator[list[bytes], None]
Key = tuple[str | None, str]  # an API key, and an idempotency key of its owner


@dataclass(eq=False)
class Answer:
    """One answer and its events so far; one that is not a stream has its body for its only event.

    Attributes:
        owner: the API key that asked for it.
        headers: of each response that carries it.
        key: the idempotency key under which it is found.
        shape: of errors and of the end of a stream.
        needs_reader: whether it is aborted, and later forgotten, if nobody reads it.
        is_made_again: whether it began in another API process, so that its readers may know more of it than was made.
        events: those that are held; `num_dropped` came before them.
        num_read: events that somebody was given.
        size: bytes that it counts as.
        error: what ended it early.
        readers: each is woken when there is news, and ends when it is taken out.
    """

    id: str
    owner: str | None
    headers: Mapping[str, str]
    is_stream: bool
    key: Key | None = None
    shape: ErrorShape = OPENAI
    needs_reader: bool = True
    is_made_again: bool = False
    events: deque[bytes] = field(default_factory=deque)
    num_dropped: int = 0
    num_read: int = 0
    size: int = ANSWER_BYTES
    is_ended: bool = False
    error: Exception | None = None
    readers: set[asyncio.Event] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def num_events(self) -> int:
        return self.num_dropped + len(self.events)

    def check(self, after: int) -> None:
        """Refuse to be read on after so many events.

        Raises:
            StreamExpiredError: the next ones are no longer held.
            InvalidRequestError: there were not so many.
        """
        if after < self.num_dropped:
            raise StreamExpiredError(
                f"the stream is only held from event {self.num_dropped + 1} on: a stream holds at most "
                f"{MAX_STREAM_BYTES} bytes, and event {after + 1} was dropped"
            )
        if after > self.num_events and not self.is_ended:
            raise InvalidRequestError(
                f"Last-Event-ID: names event {after}, but the stream has had only {self.num_events}",
                param="Last-Event-ID",
            )

    def wake(self) -> None:
        for reader in self.readers:
            reader.set()


@dataclass(eq=False)
class _Claim:
    """An idempotency key, the digest of its request, and the answer once there is one."""

    digest: bytes
    answer: Answer | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class _Held(Open):
    """Implements `Sink` for an answer that is held."""

    store: StreamStore
    answer: Answer

    def put(self, events: list[bytes]) -> None:
        self.store.put(self.answer, events)


class StreamStore:
    """Makes answers and holds them.  Time is that of the event loop.

    Args:
        grace_seconds: an answer that nobody reads is aborted after this time, or forgotten if it has ended.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self._answers: dict[str, Answer] = {}
        self._ended: dict[str, Answer] = {}  # those of them that have ended, the oldest first
        self._claims: dict[Key, _Claim] = {}
        self._num_bytes = 0

    @property
    def ids(self) -> Set[str]:
        """Those of the answers that are held."""
        return self._answers.keys()

    def begin(self, answer: Answer, work: Work) -> None:
        """Have the work make this answer."""
        self._answers[answer.id] = answer
        self._num_bytes += answer.size
        if answer.key is not None:
            self._claims[answer.key].answer = answer
            self._claims[answer.key].settled.set()
        answer.task = asyncio.create_task(self._make(answer, work))
        self._keep(answer)

    def find(self, answer_id: str, owner: str | None) -> Answer:
        """Return the answer of this id.

        Raises:
            NotFoundError: there is none that this owner asked for.
        """
        answer = self._answers.get(answer_id)
        if answer is None or answer.owner != owner:
            raise NotFoundError(
                f"no stream {answer_id[:100]!r} is held: it never was, or nobody read it for {self.grace_seconds:g} s"
            )
        return answer

    async def read(self, answer: Answer, after: int = 0, *, takes_over: bool = False) -> Events:
        """Yield the events after the first `after` of them, as they come.

        Args:
            takes_over: whether those who read it so far get no more.

        Raises:
            StreamExpiredError: the next events are no longer held, or another reader has taken over.
            ShoalError: what ended the answer early.
        """
        news = asyncio.Event()
        if takes_over:
            answer.wake()
            answer.readers.clear()
        answer.readers.add(news)
        try:
            while news in answer.readers:
                answer.check(after)
                if after < answer.num_events:
                    events = [answer.events[i - answer.num_dropped] for i in range(after, answer.num_events)]
                    after = answer.num_events
                    answer.num_read = max(answer.num_read, after)
                    yield events
                elif not answer.is_ended:
                    news.clear()
                    await news.wait()
                elif answer.error is not None:
                    raise answer.error
                else:
                    return
            raise StreamExpiredError("the stream goes on in another connection")
        finally:
            answer.readers.discard(news)
            self._keep(answer)

    async def reach(self, answer: Answer, number: int) -> None:
        """Wait until it has had so many events, or has ended.

        Raises:
            ShoalError: what ended it early.
        """
        if answer.num_events < number:
            async with aclosing(self.read(answer, answer.num_events)) as news:
                async for _ in news:
                    if answer.num_events >= number:
                        break

    def forget(self, answer: Answer) -> None:
        """Abort the answer if it has not ended, and let go of it; those who read its end may do so."""
        if self._answers.pop(answer.id, None) is None:
            return
        self._ended.pop(answer.id, None)
        self._num_bytes -= answer.size
        if answer.key is not None:
            del self._claims[answer.key]
        if answer.timer is not None:
            answer.timer.cancel()
        if answer.task is not None and not answer.is_ended:
            answer.error = StreamExpiredError("the stream was aborted")
            answer.task.cancel()

    # -- idempotency keys ------------------------------------------------------------------------------------------

    async def claim(self, key: Key, digest: bytes) -> Answer | None:
        """Return the answer under this key; None makes the caller the one who begins it, or releases the key.

        Args:
            digest: of the request.

        Raises:
            IdempotencyKeyReuseError: the key belongs to another request.
        """
        while claim := self._claims.get(key):
            if claim.digest != digest:
                raise IdempotencyKeyReuseError(
                    "Idempotency-Key: came before with another request; a new request needs a new key",
                    param="Idempotency-Key",
                )
            if claim.answer is not None:
                return claim.answer
            await claim.settled.wait()
        self._claims[key] = _Claim(digest)
        return None

    def release(self, key: Key) -> None:
        """Give the key back if no answer was begun under it: the request was refused."""
        claim = self._claims.get(key)
        if claim is not None and claim.answer is None:
            del self._claims[key]
            claim.settled.set()

    # -- the parts -------------------------------------------------------------------------------------------------

    async def _make(self, answer: Answer, work: Work) -> None:
        try:
            await work(_Held(self, answer))
        except Exception as error:
            answer.error = error
        finally:
            answer.is_ended = True
            answer.wake()
            if answer.id in self._answers:
                self._ended[answer.id] = answer
                self._keep(answer)
                self._make_room()

    def put(self, answer: Answer, events: list[bytes]) -> None:
        """Take in what came, and drop what was read already, or need not be read, if there is too much."""
        limit = min(MAX_STREAM_BYTES, MAX_BYTES // (len(self._answers) - len(self._ended)))
        num_done_with = answer.num_read if answer.needs_reader else answer.num_events
        while answer.size > limit and answer.num_dropped < num_done_with:
            self._resize(answer, -len(answer.events.popleft()))
            answer.num_dropped += 1
        if answer.size > limit:
            raise SlowClientError(f"the client does not read: {answer.size} bytes of events wait for it")
        answer.events.extend(events)
        self._resize(answer, sum(map(len, events)))
        self._make_room()
        answer.wake()

    def _resize(self, answer: Answer, num_bytes: int) -> None:
        answer.size += num_bytes
        self._num_bytes += num_bytes

    def _make_room(self) -> None:
        """Forget the oldest answers if all together are too large."""
        while self._num_bytes > MAX_BYTES and self._ended:
            self.forget(next(iter(self._ended.values())))

    def _keep(self, answer: Answer) -> None:
        """Hold the answer for the grace time from now on, and then for as long as it is read."""
        if answer.timer is not None:
            answer.timer.cancel()
        if answer.id in self._answers and answer.needs_reader:
            loop = asyncio.get_running_loop()
            answer.timer = loop.call_later(self.grace_seconds, self._expire, answer)

    def _expire(self, answer: Answer) -> None:
        if not answer.readers:
            self.forget(answer)
