"""For tests of programs that talk to Shoal: a real server process, and a pytest plug-in with fixtures (`plugin.py`).

Each name is loaded when it is first asked for, because pytest loads the plug-in wherever Shoal is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.testing.server import ServerFailedError, ServerProcess

__all__ = ["ServerFailedError", "ServerProcess"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("shoal.testing.server"), name)
