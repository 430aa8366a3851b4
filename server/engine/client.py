"""All that the HTTP side knows of the engine: submit, abort, and streams of news."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from shoal.scheduler.admission import check_queue, check_request
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError, EngineError, ShoalError
from shoal.scheduler.output import SchedulerStats
from shoal.server.engine.journal import Submission
from shoal.server.engine.messages import (
    Abort,
    Command,
    EngineConfig,
    EngineRequest,
    News,
    Ready,
    Report,
    StartFailed,
    Submit,
)
from shoal.server.errors import EngineUnavailableError
from shoal.server.metrics import Metrics

logger = logging.getLogger("shoal.engine")

RESTART_DELAYS = (0.0, 0.5, 1.0, 2.0, 5.0)  # seconds before each new start in a row; the last one from then on
NO_STATS = SchedulerStats(0, 0, 0.0, 0, 0, 0)  # of an engine that has just started, or is no more
LAST_WORDS_SECONDS = 0.2  # how long what a dead engine sent last may still be on its way


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class EngineClient:
    """Owns the engine process: starts it, starts it anew when it dies, and speaks with it.

    Args:
        metrics: told of each step and each request's tokens.
    """

    def __init__(self, config: EngineConfig, metrics: Metrics) -> None:
        self.config = config
        self.state = EngineState.STARTING
        self._limits: SchedulerConfig | None = None
        self._metrics = metrics
        self._unfinished: dict[str, Submission] = {}
        self._commands: zmq.asyncio.Socket | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._idle = asyncio.Event()
        self._idle.set()

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> Ready:
        """Start the engine and wait until it is ready.

        Raises:
            ConfigError: it cannot start with this configuration.
            EngineError: it ended before it was ready.
        """
        self._supervisor = asyncio.create_task(self._supervise())
        return await asyncio.shield(self._first_start)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; let the unfinished ones go on for a while, then end them with an error."""
        self.state = EngineState.DRAINING
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        self._fail_all(EngineUnavailableError("the server is shutting down"))

    async def stop(self) -> None:
        """End the engine process."""
        self.state = EngineState.STOPPED
        self._fail_all(EngineUnavailableError("the server is shutting down"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> SchedulerConfig:
        """The limits that the engine keeps.

        Raises:
            EngineUnavailableError: it is not ready.
        """
        if self._limits is None or self.state is not EngineState.READY:
            reason = "starting" if self.state is EngineState.STARTING else "shutting down"
            raise EngineUnavailableError(f"the server is {reason}; try again later")
        return self._limits

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def submit(self, requests: Sequence[EngineRequest]) -> Submission:
        """Take all of these requests or none.

        Raises:
            InvalidRequestError, QueueFullError, EngineUnavailableError: at once, before any work is done.
        """
        limits = self.limits
        for request in requests:
            check_request(limits, len(request.prompt_token_ids), request.params.max_tokens)
        check_queue(limits, self.num_unfinished, len(requests))
        submission = Submission(requests)
        self._unfinished |= dict.fromkeys(submission.journals, submission)
        self._idle.clear()
        self._send(Submit(list(requests)))
        return submission

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop caring for these requests; the blocks of those unfinished are free at the engine's next step."""
        unfinished = [request_id for request_id in request_ids if request_id in self._unfinished]
        for request_id in unfinished:
            self._forget(request_id)
        if unfinished:
            self._send(Abort(unfinished))

    # -- the parts -----------------------------------------------------------------------------------------------

    def _send(self, command: Command) -> None:
        if self._commands is not None:
            self._commands.send(msgspec.msgpack.encode(command))

    def _forget(self, request_id: str) -> None:
        del self._unfinished[request_id]
        if not self._unfinished:
            self._idle.set()

    def _fail_all(self, error: ShoalError) -> None:
        for submission in self._unfinished.values():
            submission.fail(error)
        self._unfinished.clear()
        self._idle.set()

    async def _supervise(self) -> None:
        """Run engine processes, one after the other."""
        num_failures = 0
        while True:
            began = time.monotonic()
            try:
                exit_code = await self._run_process()
            except Exception as error:  # whatever it is, nobody may wait for ever
                failure = error if isinstance(error, ShoalError) else EngineError(f"the engine failed: {error}")
                if not self._first_start.done():
                    self._first_start.set_exception(failure)
                    return
                logger.error("%s", failure.message)
                exit_code = 1
            if not self._first_start.done():
                self._first_start.set_exception(
                    EngineError(f"the engine ended with exit code {exit_code} at its start")
                )
                return
            if self.state is EngineState.READY:
                self.state = EngineState.STARTING
            self._fail_all(EngineError("the engine died while it worked on this request; a new one is starting"))
            self._metrics.scheduler(NO_STATS)
            num_failures = 0 if time.monotonic() - began > 60 else num_failures + 1
            delay = RESTART_DELAYS[min(num_failures, len(RESTART_DELAYS) - 1)]
            logger.error("the engine died with exit code %s; starting a new one in %.1f s", exit_code, delay)
            await asyncio.sleep(delay)

    async def _run_process(self) -> int:
        """Run one engine process until it ends; returns its exit code.

        Raises:
            ConfigError: it says that it cannot start.
        """
        folder = Path(tempfile.mkdtemp(prefix="shoal-"))
        context = zmq.asyncio.Context()
        commands, reports = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        try:
            for socket, name in ((commands, "commands"), (reports, "reports")):
                socket.set_hwm(0)
                socket.bind(f"ipc://{folder / name}")
            # -P: the working directory may hold a `server` or `model` of its own.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "shoal.server.engine.process", str(folder), stdin=asyncio.subprocess.PIPE
            )
            try:
                assert process.stdin is not None
                process.stdin.write(msgspec.json.encode(self.config) + b"\n")
                self._commands = commands
                return await self._listen(reports, process)
            finally:
                self._commands = None
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        finally:
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)

    async def _listen(self, reports: zmq.asyncio.Socket, process: asyncio.subprocess.Process) -> int:
        """Take reports until the process ends; returns its exit code."""
        receiving = asyncio.create_task(self._receive(reports))
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait((receiving, ended), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((receiving,), timeout=LAST_WORDS_SECONDS)
            if receiving.done():
                receiving.result()
            return await ended
        finally:
            receiving.cancel()
            ended.cancel()

    async def _receive(self, reports: zmq.asyncio.Socket) -> None:
        decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
        while True:
            self._take(decoder.decode(await reports.recv()))

    def _take(self, report: Report) -> None:
        match report:
            case News(outputs, stats):
                now = time.monotonic()
                self._metrics.scheduler(stats)
                for output in outputs:
                    submission = self._unfinished.get(output.request_id)
                    if submission is not None:
                        journal = submission.journals[output.request_id]
                        self._metrics.tokens(journal, output, now)
                        journal.note(output, now)
                        submission.put(output)
                        if output.finish_reason is not None:
                            self._forget(output.request_id)
            case Ready():
                self._limits = SchedulerConfig(
                    num_blocks=report.num_blocks,
                    block_size=self.config.block_size,
                    max_model_len=report.max_model_len,
                    max_num_seqs=self.config.max_num_seqs,
                    max_num_batched_tokens=self.config.max_num_batched_tokens,
                    max_chunk_tokens=self.config.max_chunk_tokens,
                    max_num_waiting=self.config.max_num_waiting,
                )
                if self.state is EngineState.STARTING:
                    self.state = EngineState.READY
                if self._first_start.done():
                    logger.info("the new engine is ready")
                else:
                    self._first_start.set_result(report)
            case StartFailed(message, param):
                raise ConfigError(message, param=param)
