"""Runs batches: validates them, has their lines answered in idle capacity, and ends them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from shoal.scheduler.errors import ShoalError
from shoal.server.batches.lines import Line, answered
from shoal.server.batches.store import BatchStore
from shoal.server.errors import EngineUnavailableError
from shoal.server.keys import owner_name
from shoal.server.routes.answer import error_response
from shoal.server.routes.chat import chat_router
from shoal.server.routes.completions import completions_router
from shoal.server.routes.embeddings import embeddings_router
from shoal.server.routes.inner import endpoints, inner_request
from shoal.server.routes.responses import responses_router
from shoal.server.service import Service
from shoal.server.wire.batches import Batch

logger = logging.getLogger("shoal.batches")

POLL_SECONDS = 0.1  # for what tells nobody that it has changed: idle capacity and time
RETRY_SECONDS = 5.0


class BatchRunner:
    """Answers lines by the code of the routes, without the limits of API keys.

    The oldest batch goes first.  Batches of another model, or of an API key that the server does not have, wait for a
    server that has it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._batches = service.batches
        self._engine = service.engine
        self._keys = {owner_name(key): key for key in service.api_keys or (None,)}
        self._endpoints = endpoints(service, chat_router, completions_router, responses_router, embeddings_router)
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}  # of lines that run, by batch and number
        self._is_crowded = False  # a line was refused for lack of room
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Take all lines back; another start goes on with them."""
        tasks = [*self._tasks.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        said = ""
        while True:
            self._batches.changed.clear()
            try:
                is_busy = self._batches.exist and await self._turn()
                seconds, said = POLL_SECONDS if is_busy else None, ""
            except Exception as error:  # whatever it is, batches go on when it is over
                seconds = RETRY_SECONDS
                if str(error) != said:
                    said = str(error)
                    logger.warning("batches wait: %s", said, exc_info=not isinstance(error, ShoalError))
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._batches.changed.wait()

    async def _turn(self) -> bool:
        """Do what can be done now; returns whether there are unfinished batches."""
        for place, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[place]
                if not task.cancelled():
                    task.result()
        if self._is_full and self._engine.journals() and self._engine.num_of_lines:
            self._engine.take_back()  # others wait: for blocks, or for their share of steps
        unfinished = await self._batches.ask(BatchStore.unfinished)
        for owner, batch in unfinished:
            if batch.status == "validating":
                await self._validate(batch)
            elif batch.status == "cancelling" or self._batches.clock() >= batch.expires_at or _is_answered(batch):
                await self._finish(batch)
            elif batch.model == self._service.model_name and owner in self._keys:
                await self._start_lines(batch, self._keys[owner])
        return bool(unfinished)

    async def _validate(self, batch: Batch) -> None:
        max_bytes = self._service.settings.server.max_body_bytes
        await self._batches.ask(lambda store: store.validate(batch.id, max_bytes))
        self._batches.changed.set()

    async def _finish(self, batch: Batch) -> None:
        tasks = [task for (batch_id, _), task in self._tasks.items() if batch_id == batch.id]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._batches.ask(lambda store: store.finish(batch.id))
        self._batches.changed.set()

    async def _start_lines(self, batch: Batch, api_key: str | None) -> None:
        """Start as many lines of a batch as there is room for."""
        if (room := self._room()) <= 0:
            return
        lines = await self._batches.ask(lambda store: store.lines(batch.id, room + len(self._tasks)))
        for line in lines:
            place = batch.id, line.number
            if place not in self._tasks and self._room() > 0:
                self._tasks[place] = asyncio.create_task(self._answer(batch, line, api_key))

    @property
    def _is_full(self) -> bool:
        """Whether requests wait, of whomever."""
        return self._service.metrics.totals()["num_requests_waiting"] > 0

    def _room(self) -> int:
        """Lines that can be started without anybody having to wait."""
        engine = self._engine
        try:
            engine.check_health()
        except EngineUnavailableError:
            return 0
        self._is_crowded = self._is_crowded and bool(self._tasks)
        if self._is_full or self._is_crowded:
            return 0
        return engine.num_rows - len(engine.journals()) - max(engine.num_of_lines, len(self._tasks))

    async def _answer(self, batch: Batch, line: Line, api_key: str | None) -> None:
        """Have the endpoint answer a line, and keep the answer; what there was no room for is tried again."""
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        try:
            with self._engine.line():
                response = await self._endpoints[batch.endpoint](inner_request(batch.endpoint, line.body, headers))
        except ShoalError as error:
            response = error_response(error)
        except Exception:
            logger.exception("a line of a batch failed")
            response = error_response(ShoalError("internal error"))
        if response.status_code in (429, 503):
            self._is_crowded = True
            return
        is_error = response.status_code != 200
        data = answered(line.custom_id, response)
        if await self._batches.ask(lambda store: store.commit(batch.id, line.number, data, is_error=is_error)):
            self._service.metrics.batch_line("failed" if is_error else "completed")
        self._batches.changed.set()


def _is_answered(batch: Batch) -> bool:
    counts = batch.request_counts
    return counts.completed + counts.failed == counts.total
