"""Shoal, a miniature LLM inference server.

    from shoal import LLM, SamplingParams

    with LLM("shoal-moe") as llm:
        print(llm.generate("def fib(n):", SamplingParams(max_tokens=64))[0].text)

Each name is loaded when it is first asked for, so that `import shoal` is cheap.

The rooms lie at the top of the source tree and are linked into this package, so that only one name is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.clients import AsyncShoalClient, ClientError, ShoalClient
    from shoal.scheduler.errors import ShoalError
    from shoal.server.llm import LLM, SamplingParams

__all__ = ["LLM", "AsyncShoalClient", "ClientError", "SamplingParams", "ShoalClient", "ShoalError"]

_MODULES = {
    "AsyncShoalClient": "shoal.clients",
    "ClientError": "shoal.clients",
    "LLM": "shoal.server.llm",
    "SamplingParams": "shoal.server.llm",
    "ShoalClient": "shoal.clients",
    "ShoalError": "shoal.scheduler.errors",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
