"""What the operating system hands a process: standard files and open descriptors."""

from __future__ import annotations

import os
import resource
import sys

from shoal.scheduler.errors import ConfigError

MIN_DESCRIPTORS, MAX_DESCRIPTORS = 128, 65536


def open_standard_files() -> None:
    """Open what was closed of standard input, output and error, on the null device.

    Else the first sockets would take their numbers, and a line that is printed would go to a client.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (for good)


def descriptor_limit() -> int:
    """How many descriptors this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_DESCRIPTORS)


def raise_limit() -> None:
    """Raise the limit of open descriptors as far as a server needs.

    Raises:
        ConfigError: it is too low, and may not be raised.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if descriptor_limit() < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if descriptor_limit() < MIN_DESCRIPTORS:
        raise ConfigError(
            f"this process may open {descriptor_limit()} files, but a server needs at least {MIN_DESCRIPTORS}: "
            f"raise the limit, for example with ulimit -n 4096"
        )
