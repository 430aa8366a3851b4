"""The file to which the engine writes its steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.scheduler.errors import ConfigError
from shoal.scheduler.trace import ChromeTrace, StepRecord

logger = logging.getLogger("shoal.engine")


def begin_trace(path: Path) -> None:
    """Start the file anew, before any engine does.

    Raises:
        ConfigError: it cannot be written.
    """
    with _refusing(path):
        path.write_bytes(b"")


def open_trace(path: Path) -> Callable[[StepRecord], None]:
    """An observer that writes each step to the file as soon as it is over; an engine that takes the place of one that
    died goes on where that ended.

    Raises:
        ConfigError: it cannot be written.
    """
    with _refusing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    continues = os.fstat(descriptor).st_size > 0
    return ChromeTrace(_Writer(descriptor, path).write, pid=os.getpid(), continues=continues).step


class _Writer:
    """Writes to a file without a buffer, for as long as the process lives.  A full disk ends the trace, and not the
    engine."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor: int | None = descriptor
        self._path = path

    def write(self, text: str) -> None:
        if self._descriptor is not None:
            try:
                os.write(self._descriptor, text.encode())
            except OSError as error:
                logger.error("the trace %s ends here: %s", self._path, error.strerror)
                os.close(self._descriptor)
                self._descriptor = None


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"trace: cannot write {path}: {error.strerror}", param="trace") from error
