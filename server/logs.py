"""What the server logs: lines for people, coloured on a terminal, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from asyncio import CancelledError

from shoal.server.settings import ServerConfig

PROBES = ("/health", "/ready", "/live", "/ping", "/load", "/metrics", "/version")  # ask how the server is
_MAX_PATH_CHARS = 200
_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}


def set_up_logs(config: ServerConfig) -> None:
    """Send all logs to standard error, in the format and from the level that the settings name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if config.log_format == "json" else TextLines(colour=sys.stderr.isatty()))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks"):
        setattr(logging, name, False)  # no line says these, and finding them out takes time
    logging.getLogger("uvicorn.access").addFilter(is_news)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # what it says of its start, the server says better
    logging.getLogger("uvicorn.error").addFilter(is_no_end)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a request is worth a line: those that ask how the server is come every few seconds.

    The query is taken out of the line, for somebody may have put a key there, and a path is cut.
    """
    if isinstance(record.args, tuple) and len(record.args) > 2:
        path = str(record.args[2]).partition("?")[0][:_MAX_PATH_CHARS]
        record.args = (*record.args[:2], path, *record.args[3:])
        return path not in PROBES
    return True


def is_no_end(record: logging.LogRecord) -> bool:
    """Whether it is another exception than that by which a request is ended with the server."""
    return not (record.exc_info and isinstance(record.exc_info[1], CancelledError))


class TextLines(logging.Formatter):
    """`12:00:00.123 INFO shoal: message`, the level in colour where it matters."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        code = _COLOURS.get(record.levelno) if self._colour else None
        return f"\x1b[{code}m{line}\x1b[0m" if code else line


class JsonLines(logging.Formatter):
    """An object a line: `time` (UTC, ISO 8601), `level`, `logger`, `message`, and `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{utc}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)
