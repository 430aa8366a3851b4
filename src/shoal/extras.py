"""The optional parts of Shoal, which are extras in `pyproject.toml`, and how to install what they need."""

from __future__ import annotations

import shlex
import sys


def install_command(extra: str, *options: str) -> str:
    """The command that installs what an extra needs into the running environment.

    It names the packages, since `pip install shoal[extra]` would look for Shoal on an index, where it is not.

    Args:
        extra: "torch" or "loadtest", for example.
        options: options of `pip install`.
    """
    from importlib.metadata import requires  # noqa: PLC0415 (few need it, and it takes as long as asyncio to load)

    marker = f"; extra == '{extra}'"  # as hatchling writes it
    packages = [needed.removesuffix(marker) for needed in requires("shoal") or () if needed.endswith(marker)]
    return shlex.join([sys.executable, "-m", "pip", "install", *options, *packages])
