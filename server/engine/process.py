"""The engine process: `python -m shoal.server.engine.process SOCKET_FOLDER`, its settings as JSON on standard input.

One thread.  It waits for commands while there is nothing to do, takes what has come between steps otherwise, and sends
what came of a step as one message.  It ends when it is told to, or with its parent: when its standard input ends.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import msgspec
import zmq

from shoal.scheduler.errors import ShoalError
from shoal.server.engine.build import build_engine
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Loading, StartFailed
from shoal.server.engine.preparing import Preparing
from shoal.server.engine.sockets import Sockets
from shoal.server.engine.watching import Watching
from shoal.server.settings import resolve


def _end_with_parent(folder: Path) -> None:
    """Wait for the end of standard input."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    _end(folder)


def _end(folder: Path) -> NoReturn:
    """End at once, and remove what the parent could not clean up any more."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def give_up(reason: str) -> None:
    """End at once; another engine takes the place of this one."""
    logging.getLogger("shoal.engine").error("%s", reason)
    os._exit(1)


def main() -> None:
    # A terminal or a supervisor may send these to both processes: the API process drains, and ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    settings = resolve(msgspec.json.decode(sys.stdin.buffer.readline() or _end(folder)))
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    sockets = Sockets.connect(folder)
    try:
        engine = build_engine(settings, lambda what: sockets.send(Loading(what)), give_up)
    except ShoalError as error:
        sockets.send(StartFailed(error.message, error.param))
        zmq.Context.instance().term()  # waits until it is sent
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays; no collection need look at it again
    sockets.send(engine.ready)
    try:
        EngineLoop(engine.core, Watching(Preparing(sockets, engine.grammars), engine.core, settings.knobs)).run()
    except SystemExit as end:
        give_up(str(end))
    engine.close()


if __name__ == "__main__":
    main()
