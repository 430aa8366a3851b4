"""An engine process that plays a script: the model's name at its start, then each prompt's first token.

It is started in the real one's place, with the same arguments: `... SOCKET_FOLDER`, settings on standard input.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import FinishReason, RequestOutput, SchedulerStats
from shoal.server.engine.messages import (
    Abort,
    Command,
    EngineRequest,
    News,
    Ready,
    Report,
    StartFailed,
    Stop,
    Submit,
)
from shoal.server.engine.packing import decode_hook

ANSWER, SILENCE, DIE, DIE_AFTER_A_TOKEN, GARBAGE, FAIL, HANG_AFTER_A_TOKEN = range(1, 8)
TOKENS = [11, 12, 13]


def outputs(request: EngineRequest) -> list[RequestOutput]:
    """A token at a time, in messages of their own; a request that was resumed after some tokens goes on behind them."""
    name = request.request_id
    if request.output_token_ids:
        left = TOKENS[len(request.output_token_ids) :]
        return [RequestOutput(name, left, FinishReason.STOP)]
    match request.prompt_token_ids[0]:
        case 1:
            return [RequestOutput(name, [TOKENS[0]], num_cached_tokens=3, queue_time=0.25)] + [
                RequestOutput(name, [token_id], FinishReason.STOP if token_id == TOKENS[-1] else None)
                for token_id in TOKENS[1:]
            ]
        case 4 | 7:
            return [RequestOutput(name, [TOKENS[0]])]
        case 6:
            return [RequestOutput(name, [], FinishReason.ERROR, error="out of luck")]
    return []


def main() -> None:
    settings = msgspec.json.decode(sys.stdin.buffer.readline())
    folder = Path(sys.argv[-1])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    commands, reports = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.connect(f"ipc://{folder / 'commands'}")
    reports.connect(f"ipc://{folder / 'reports'}")

    def send(report: Report) -> None:
        reports.send(msgspec.msgpack.encode(report))

    def end(code: int) -> None:
        context.destroy(linger=2000)
        os._exit(code)

    was_here = folder.parent / "was-here"
    match settings["model"]:
        case "dies later" if was_here.exists():
            end(3)
        case "refuses":
            send(StartFailed("num_blocks: too many", "num_blocks"))
            end(1)
        case "dies":
            end(3)
        case "babbles":
            reports.send(b"\xc1 no message")
        case _:
            limits = SchedulerConfig(
                num_blocks=64, max_model_len=512, max_num_seqs=2, max_num_batched_tokens=16, max_num_waiting=1
            )
            if settings["model"] == "dies later":
                was_here.touch()
            send(Ready(limits, 1, 2, "a fake", None))

    play(settings, commands, reports, end)


def play(settings: Any, commands: Any, reports: Any, end: Callable[[int], None]) -> None:
    """Answer commands, for ever."""
    decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=decode_hook)
    num_aborted = 0

    def send(report: Report) -> None:
        reports.send(msgspec.msgpack.encode(report))

    while True:
        command = decoder.decode(commands.recv())
        match command:
            case Submit(requests):
                for request in requests:
                    for output in outputs(request):
                        send(News([output], SchedulerStats(1, num_aborted, 0.5, 1, 2, 1)))
                    match request.prompt_token_ids[0]:
                        case 3 | 4 if not request.output_token_ids:
                            end(5)
                        case 7 if not request.output_token_ids:
                            time.sleep(1000)
                        case 5:
                            reports.send(b"\xc1 no message")
            case Abort(request_ids):
                num_aborted += len(request_ids)
                send(News([], SchedulerStats(0, num_aborted, 0.0, 1, 2, 1)))
            case Stop():
                Path(settings["engine"]["trace"] or os.devnull).write_text("closed")
                end(0)


if __name__ == "__main__":
    main()
