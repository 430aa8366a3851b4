"""Shoal, a miniature LLM inference server.

    from shoal import ShoalClient

    with ShoalClient() as client:
        print(client.complete("def fib(n):", max_tokens=64).text)

Each name is loaded when it is first asked for, so that `import shoal` is cheap.

The rooms lie at the top of the source tree and are linked into this package, so that only one name is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.clients import AsyncShoalClient, ClientError, ShoalClient

__all__ = ["AsyncShoalClient", "ClientError", "ShoalClient"]

_MODULES = {
    "AsyncShoalClient": "shoal.clients",
    "ClientError": "shoal.clients",
    "ShoalClient": "shoal.clients",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
