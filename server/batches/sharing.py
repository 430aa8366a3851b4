"""One engine for everybody and for lines of batches, which take only what nobody else wants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from typing import Any

from shoal.scheduler.errors import QueueFullError
from shoal.server.engine.client import EngineClient
from shoal.server.engine.engine import Engine
from shoal.server.engine.event_log import EventLog
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest, Ready
from shoal.server.engine.submission import Submission

_line: ContextVar[asyncio.Task[Any] | None] = ContextVar("line", default=None)  # the task that runs it


class SharedEngine:
    """An engine that has lines of batches beside the requests of others, who do not see them.  Implements `Engine`.

    A line gives way to a request that would have to wait, and is run again later.  So nobody is refused, or waits,
    because of lines.

    Args:
        clients: of all engines that it is.
    """

    def __init__(self, engine: Engine, clients: Sequence[EngineClient]) -> None:
        self._engine = engine
        self._clients = clients
        self._lines: dict[asyncio.Task[Any] | None, list[str]] = {}  # ids of requests by what runs the line, in order

    @property
    def ready(self) -> Ready:
        return self._engine.ready

    def journals(self) -> list[Journal]:
        return [journal for journal in self._engine.journals() if not journal.gives_way]

    @property
    def num_rows(self) -> int:
        """Requests that are computed at once."""
        return self.ready.limits.max_num_seqs * max(1, sum(client.is_connected for client in self._clients))

    @property
    def logs(self) -> list[EventLog]:
        """Of the steps of each engine, for those who watch."""
        return [client.events for client in self._clients]

    @property
    def events(self) -> EventLog:
        """Of the first engine."""
        return self.logs[0]

    @property
    def num_of_lines(self) -> int:
        """Unfinished requests of lines."""
        return sum(journal.gives_way for journal in self._engine.journals())

    def check_health(self) -> None:
        self._engine.check_health()

    def check_room(self) -> None:
        if not self.num_of_lines:
            self._engine.check_room()

    def submit(self, requests: Sequence[EngineRequest], timeout: float = inf) -> Submission:
        task = _line.get()
        if task in self._lines:
            request_ids = self._lines[task]
            submission = self._engine.submit(requests, timeout)
            for request_id, journal in submission.journals.items():
                journal.gives_way = True
                request_ids.append(request_id)
            return submission
        while self.num_of_lines and len(self._engine.journals()) + len(requests) > self.num_rows:
            self.take_back()
        while True:
            try:
                return self._engine.submit(requests, timeout)
            except QueueFullError:  # by another bound, which counts what lines have
                if not self.num_of_lines:
                    raise
                self.take_back()

    def forget_prefixes(self) -> None:
        self._engine.forget_prefixes()

    def abort(self, request_ids: Iterable[str]) -> None:
        self._engine.abort(request_ids)

    @contextmanager
    def line(self) -> Iterator[None]:
        """What this task and those that it starts submit meanwhile is a line's, and ends with it."""
        task = asyncio.current_task()
        self._lines[task] = []
        token = _line.set(task)
        try:
            yield
        finally:
            _line.reset(token)
            self._engine.abort(self._lines.pop(task))

    def take_back(self) -> None:
        """Have the youngest line give way: its requests end here and now, and its task is cancelled."""
        task, request_ids = next((task, ids) for task, ids in reversed(self._lines.items()) if ids)
        self._engine.abort(request_ids)
        request_ids.clear()
        if task is not None:
            task.cancel()
