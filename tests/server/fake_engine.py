"""An engine process that plays a script: the model's name at its start, then each prompt's first token.

It is started in the real one's place, and has the real one's end of the sockets.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import FinishReason, RequestOutput, SchedulerStats
from shoal.server.engine.messages import (
    Abort,
    Begin,
    EngineRequest,
    News,
    Ready,
    StartFailed,
    Stop,
    Submit,
)
from shoal.server.engine.sockets import EngineSocket

ANSWER, SILENCE, DIE, DIE_AFTER_A_TOKEN, GARBAGE, FAIL, HANG_AFTER_A_TOKEN = range(1, 8)
TOKENS = [11, 12, 13]
GIBBERISH = b"\x01\0\0\0\xc1"  # a message of one byte, which msgpack never uses


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
    wire = EngineSocket(socket.socket(fileno=sys.stdin.fileno()))
    [begin] = wire.receive(None)
    assert isinstance(begin, Begin)
    settings = begin.sections
    was_here = Path(sys.argv[1]) / "was-here"
    match settings["model"]:
        case "dies later" if was_here.exists():
            os._exit(3)
        case "refuses":
            wire.send(StartFailed("num_blocks: too many", "num_blocks"))
            os._exit(1)
        case "dies":
            os._exit(3)
        case "babbles":
            wire.socket.sendall(GIBBERISH)
        case _:
            limits = SchedulerConfig(
                num_blocks=64, max_model_len=512, max_num_seqs=2, max_num_batched_tokens=16, max_num_waiting=1
            )
            if settings["model"] == "dies later":
                was_here.touch()
            wire.send(Ready(limits, 1, 2, "a fake", None))
    play(settings, wire)


def play(settings: Any, wire: EngineSocket) -> NoReturn:
    """Answer commands, for ever."""
    num_aborted = 0
    while True:
        for command in wire.receive(None):
            match command:
                case Submit(requests):
                    for request in requests:
                        for output in outputs(request):
                            wire.send(News([output], SchedulerStats(1, num_aborted, 0.5, 1, 2, 1)))
                        match request.prompt_token_ids[0]:
                            case 3 | 4 if not request.output_token_ids:
                                os._exit(5)
                            case 7 if not request.output_token_ids:
                                time.sleep(1000)
                            case 5:
                                wire.socket.sendall(GIBBERISH)
                case Abort(request_ids):
                    num_aborted += len(request_ids)
                    wire.send(News([], SchedulerStats(0, num_aborted, 0.0, 1, 2, 1)))
                case Stop():
                    Path(settings["engine"]["trace"] or os.devnull).write_text("closed")
                    os._exit(0)


if __name__ == "__main__":
    main()
