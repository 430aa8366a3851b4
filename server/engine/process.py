"""The engine process: `python -m shoal.server.engine.process SOCKET_FOLDER`, configured by JSON on standard input.

One thread.  It waits for commands while there is nothing to do yet, takes what has come between steps otherwise, and
sends what came of a step as one message.  It ends when its standard input does, that is, with its parent.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path

import msgspec
import zmq

from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.step.executor import ModelExecutor
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import ConfigError, ShoalError
from shoal.scheduler.output import FinishReason, RequestOutput, SchedulerStats
from shoal.scheduler.policies import create_policy, select_knobs
from shoal.scheduler.request import Request
from shoal.scheduler.scheduler import Scheduler
from shoal.server.engine.backends import plan_backend
from shoal.server.engine.endings import Endings
from shoal.server.engine.memory import plan_kv_cache
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
from shoal.server.engine.speculation import plan_speculation
from shoal.server.engine.tracing import open_trace


@dataclass(frozen=True)
class Sockets:
    """The engine's ends of the two sockets in a folder that the API process made."""

    commands: zmq.Socket[bytes]
    reports: zmq.Socket[bytes]

    @classmethod
    def connect(cls, folder: Path) -> Sockets:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        commands, reports = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for socket, name in ((commands, "commands"), (reports, "reports")):
            socket.set_hwm(0)
            socket.connect(f"ipc://{folder / name}")
        return cls(commands, reports)

    def send(self, report: Report) -> None:
        self.reports.send(_encoder.encode(report))

    def receive(self, seconds: float | None) -> list[Command]:
        """All commands that have come; waits so long for the first, or for ever (None)."""
        if seconds != 0:
            self.commands.poll(None if seconds is None else ceil(seconds * 1000))
        commands: list[Command] = []
        while True:
            try:
                commands.append(_decoder.decode(self.commands.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return commands


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def build_engine(config: EngineConfig) -> tuple[EngineCore, Ready]:
    """Load the model and put the engine together.

    Raises:
        CheckpointError, ConfigError: the checkpoint or a setting does not allow it.
    """
    record = load_checkpoint(Path(config.checkpoint))
    limit = record.config.max_position_embeddings
    max_model_len = config.max_model_len or limit
    if max_model_len > limit:
        raise ConfigError(f"max_model_len {max_model_len} exceeds the model's {limit} positions", param="max_model_len")
    plan = plan_backend(config, record.config)
    guessing = plan_speculation(config, record, max_model_len)
    models = [record.config, *([guessing.draft.config] if guessing and guessing.draft else [])]
    cache = plan_kv_cache(
        config, *models, dtype=plan.kv_cache_dtype, max_model_len=max_model_len, free=plan.free_memory()
    )
    limits = SchedulerConfig(
        num_blocks=cache.num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_chunk_tokens=config.max_chunk_tokens,
        max_num_waiting=config.max_num_waiting,
        enable_prefix_caching=config.enable_prefix_caching,
        num_lookahead_tokens=guessing.num_lookahead_tokens if guessing else 0,
    )
    knobs = select_knobs(config.policy, msgspec.structs.asdict(config))
    scheduler = Scheduler(limits, create_policy(config.policy, limits, knobs))
    backend = plan.create(record, cache.num_blocks)
    executor = ModelExecutor(
        backend,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        block_size=config.block_size,
        speculate=partial(guessing.create, plan, backend, cache.num_blocks) if guessing else None,
    )
    ready = Ready(
        cache.num_blocks,
        max_model_len,
        record.num_parameters,
        cache.num_bytes,
        plan.describe(backend),
        plan.warning,
    )
    observe = open_trace(Path(config.trace)) if config.trace is not None else None
    return EngineCore(scheduler, executor, time.monotonic, observe), ready


class EngineLoop:
    """Feeds an `EngineCore` from the sockets, for ever, and has requests end where they say."""

    def __init__(self, core: EngineCore, sockets: Sockets) -> None:
        self.core = core
        self.sockets = sockets
        self._endings = core.executor = Endings(core.executor)
        self._reported: SchedulerStats | None = None

    def run(self) -> None:
        while True:
            self.turn()

    def turn(self) -> None:
        """Wait for something to do, take the commands that have come, run one step, report."""
        now = self.core.clock()
        wake_time = self.core.scheduler.wake_time(now)
        outputs: list[RequestOutput] = []
        for command in self.sockets.receive(None if wake_time is None else wake_time - now):
            match command:
                case Submit(requests):
                    outputs += [refusal for request in requests if (refusal := self._add(request))]
                case Abort(request_ids):
                    for request_id in request_ids:
                        self.core.scheduler.abort(request_id)
                        self._endings.forget(request_id)
        outputs += self.core.step()
        for output in outputs:
            if output.finish_reason is not None:
                self._endings.forget(output.request_id)
        stats = self.core.scheduler.stats()
        if outputs or stats != self._reported:
            self.sockets.send(News(outputs, stats))
            self._reported = stats
        if self.core.scheduler.num_unfinished == 0:
            self.core.scheduler.check_invariants()

    def _add(self, sent: EngineRequest) -> RequestOutput | None:
        """Hand a request to the scheduler; what it refuses gets an answer too."""
        request = Request(
            sent.request_id,
            sent.prompt_token_ids,
            sent.params,
            sent.arrival_time,
            sent.output_token_ids,
            scheduling=sent.scheduling,
            speculates=sent.speculates,
        )
        try:
            self.core.scheduler.add(request)
        except ShoalError as error:
            return RequestOutput(sent.request_id, [], FinishReason.ERROR, error=error.message)
        self._endings.expect(sent)
        return None


def _end_with_parent(folder: Path) -> None:
    """Wait for the end of standard input.  What the parent could not clean up any more is removed."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or supervisor may send them to both processes,
        signal.signal(number, signal.SIG_IGN)  # but it is the API process that drains, and ends this one
    folder = Path(sys.argv[1])
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    sockets = Sockets.connect(folder)
    try:
        core, ready = build_engine(config)
    except ShoalError as error:
        sockets.send(StartFailed(error.message, error.param))
        zmq.Context.instance().term()  # waits until it is sent
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays; no collection need look at it again
    sockets.send(ready)
    EngineLoop(core, sockets).run()


if __name__ == "__main__":
    main()
