"""Starts the server: the port is taken and the engines are launched before what serves is imported.

So an engine loads the model while this process imports; each takes about as long as the other.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time

from shoal.scheduler.errors import ConfigError
from shoal.server.engine.child import EngineProcess
from shoal.server.engine.chrome_trace import begin_trace
from shoal.server.engine.share import share
from shoal.server.settings import Settings
from shoal.server.tls import check_certificate

logger = logging.getLogger("shoal")


async def start(settings: Settings) -> None:
    """Start, and serve until a signal ends it.

    Raises:
        CheckpointError, ConfigError: it cannot start.
    """
    began = time.monotonic()
    check_certificate(settings.server)
    listener = listen(settings.server.host, settings.server.port)
    async with contextlib.AsyncExitStack() as until_served:
        until_served.enter_context(listener)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
            milliseconds = 1000 * settings.server.client_timeout_seconds
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        engines = []
        for number in range(settings.engine.engines):
            own = share(settings, number)
            if own.engine.trace is not None:
                begin_trace(own.engine.trace)
            engines.append(await EngineProcess.launch(own))
            until_served.push_async_callback(engines[-1].close, gently=False)
        from importlib.metadata import version  # noqa: PLC0415 (see above)

        from shoal.server.serve import serve  # noqa: PLC0415

        logger.info("Shoal %s starts: model %s", version("shoal"), settings.model)
        await serve(settings, listener, engines, began)


def listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow begins.

    Raises:
        ConfigError: it is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except UnicodeError as error:
        raise ConfigError(f"host: {host!r} is not a host name", param="host") from error
    except OSError as error:
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise ConfigError(
            f"cannot listen on host {host}, port {port}: {error.strerror}; choose another with --port or --host",
            param="port" if is_port else "host",
        ) from error
    return listener
