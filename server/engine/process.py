"""The engine process: `python -m shoal.server.engine.process`, whose standard input is a socket to its parent.

One thread.  It waits for commands while there is nothing to do, takes what has come between steps otherwise, and sends
what came of a step as one message.  It ends when it is told to, or with its parent.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import threading

from shoal.scheduler.errors import ShoalError
from shoal.server.engine.build import build_engine
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Begin, Loading, StartFailed
from shoal.server.engine.preparing import Preparing
from shoal.server.engine.share import give_way
from shoal.server.engine.sockets import EngineSocket
from shoal.server.engine.watching import Watching
from shoal.server.settings import resolve


def _end_with_parent() -> None:
    """Wait until the other end of standard input is closed: that alone is told, whatever else comes."""
    poller = select.poll()
    poller.register(sys.stdin.fileno(), 0)
    poller.poll()
    os._exit(0)


def give_up(reason: str) -> None:
    """End at once; another engine takes the place of this one."""
    logging.getLogger("shoal.engine").error("%s", reason)
    os._exit(1)


def main() -> None:
    # A terminal or a supervisor may send these to both processes: the API process drains, and ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    give_way(to_engines=False)  # as the parent may, which starts engines anew
    threading.Thread(target=_end_with_parent, daemon=True).start()
    api = EngineSocket(socket.socket(fileno=sys.stdin.fileno()))
    try:
        run(api)
    except (EOFError, ConnectionError):
        os._exit(0)


def run(api: EngineSocket) -> None:
    """Be the engine that the first command says, until a `Stop` comes."""
    while not (commands := api.receive(None)):
        pass
    [begin] = commands
    assert isinstance(begin, Begin)
    settings = resolve(begin.sections)
    try:
        engine = build_engine(settings, lambda what: api.send(Loading(what)), give_up)
    except ShoalError as error:
        api.send(StartFailed(error.message, error.param))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays; no collection need look at it again
    api.send(engine.ready)
    try:
        EngineLoop(engine.core, Watching(Preparing(api, engine.grammars), engine.core, settings.knobs)).run()
    except SystemExit as end:
        give_up(str(end))
    engine.close()


if __name__ == "__main__":
    main()
