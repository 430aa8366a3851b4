"""What each room may import: each room has one job and reaches only where `ROOMS` says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Room:
    """What the files of a room may import.

    Attributes:
        ours: our modules, each with all below it; a room may always import itself.
        outside: libraries, by the name of their top package.
    """

    ours: frozenset[str]
    outside: frozenset[str]


def _room(ours: str, outside: str) -> Room:
    return Room(frozenset(ours.split()), frozenset(outside.split()))


ROOMS = {
    "scheduler": _room("", ""),
    "model": _room(
        "shoal.extras shoal.scheduler.config shoal.scheduler.errors shoal.scheduler.output",
        "click gguf jinja2 llguidance numpy safetensors tokenizers torch",
    ),
    "server": _room(
        "shoal.extras shoal.receipts shoal.terminal shoal.scheduler shoal.model",
        "click fastapi llguidance msgspec numpy opentelemetry prometheus_client pydantic pydantic_core starlette "
        "uvicorn uvloop",
    ),
    "cluster": _room(
        "shoal.extras shoal.terminal shoal.scheduler shoal.model shoal.server",
        "click msgspec ray zmq",
    ),
    "clients": _room("", "click httpx httpx_sse"),
    "loadtest": _room(
        "shoal.extras shoal.receipts shoal.terminal shoal.testing shoal.clients shoal.scheduler",
        "click gevent geventhttpclient jinja2 locust matplotlib msgspec numpy scipy tqdm",
    ),
}
TORCH_MAY_BE_IN = ("model/backends/torch_", "model/training/")
# The baseline of load tests that is no server of ours reads the same checkpoints.
GENERATE, GENERATE_IMPORTS = "loadtest/generate.py", ("torch", "transformers", "shoal.model.checkpoint.find")
OPENTELEMETRY_MAY_BE_IN = ("server/tracing.py", "server/terms.py")  # and loads in the first alone
ONLY_IN_TRAINING = frozenset({"click", "safetensors", "tqdm", "transformers"})
# The build asks for the compiler, and MKL takes its orders from the environment alone.
READS_ENVIRONMENT = ("server/sources.py", "model/native/build.py", "model/backends/torch_layers.py")


@cache
def imports(path: str, source: str) -> tuple[str, ...]:
    """All modules that a file imports, wherever in it, with the names taken from them."""
    return tuple(_imports(path, source))


def _imports(path: str, source: str) -> Iterator[str]:
    package = ["shoal", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_allowed(path: str, module: str) -> bool:
    room, top = path.partition("/")[0], module.partition(".")[0]
    if path == GENERATE and f"{module}.".startswith(tuple(f"{allowed}." for allowed in GENERATE_IMPORTS)):
        return True
    if top == "torch":
        return "torch" in ROOMS[room].outside and path.startswith(TORCH_MAY_BE_IN)
    if top == "opentelemetry":
        return path in OPENTELEMETRY_MAY_BE_IN
    if top == "shoal":
        return any(f"{module}.".startswith(f"{ours}.") for ours in (f"shoal.{room}", *ROOMS[room].ours))
    if path.startswith("model/training/") and top in ONLY_IN_TRAINING:
        return True
    return top in sys.stdlib_module_names or top in ROOMS[room].outside


def reads_environment(source: str) -> bool:
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr in names:
                return True
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and any(a.name in names for a in node.names):
            return True
    return False


def files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", files())
def test_a_file_imports_only_what_its_room_may(path: str) -> None:
    found = [module for module in imports(path, (ROOT / path).read_text("utf-8")) if not is_allowed(path, module)]
    assert not found, f"{path} may not import {', '.join(found)}"


@pytest.mark.parametrize("path", files())
def test_only_the_settings_read_the_environment(path: str) -> None:
    assert path in READS_ENVIRONMENT or not reads_environment((ROOT / path).read_text("utf-8"))


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("scheduler/a.py", "import heapq, shoal.scheduler.output", True),
        ("scheduler/a.py", "import numpy", False),
        ("scheduler/a.py", "from shoal.model.step.batch import ForwardBatch", False),
        ("scheduler/a.py", "def f():\n    import torch.nn", False),
        ("model/a.py", "from shoal.scheduler import output", True),
        ("model/a.py", "from shoal.scheduler.errors import ConfigError", True),
        ("model/a.py", "from shoal.scheduler import scheduler", False),
        ("model/a.py", "import shoal.scheduler", False),
        ("model/a.py", "from shoal.scheduler.request import Request", False),
        ("model/a.py", "from shoal.server import cli", False),
        ("model/a.py", "import torch", False),
        ("model/backends/torch_layers.py", "import torch", True),
        ("model/backends/native.py", "from torch import Tensor", False),
        ("model/training/loss.py", "import torch, tqdm\nfrom .. import batch", True),
        ("model/training/loss.py", "from ...scheduler import request", False),
        ("server/a.py", "import shoal.scheduler.scheduler, shoal.model.step.executor, msgspec", True),
        ("server/a.py", "import torch", False),
        ("server/a.py", "from opentelemetry import trace", False),
        ("server/a.py", "import shoal.clients", False),
        ("cluster/a.py", "import ray, shoal.server.serve", True),
        ("server/a.py", "import shoal.cluster.link", False),
        ("server/a.py", "import ray", False),
        ("clients/a.py", "import httpx", True),
        ("clients/a.py", "from shoal.scheduler.errors import ShoalError", False),
        ("loadtest/a.py", "import shoal.clients, shoal.scheduler.engine, locust", True),
        ("loadtest/a.py", "import shoal.model", False),
        ("loadtest/a.py", "from tests.fakes import Harness", False),
    ],
)
def test_the_rules_tell_right_from_wrong(path: str, source: str, allowed: bool) -> None:
    assert all(is_allowed(path, module) for module in imports(path, source)) == allowed


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos.environ['A']", True),
        ("import os\nos.getenv('A')", True),
        ("from os import environ", True),
        ("import os\nos.cpu_count()", False),
        ("self.environ", False),
    ],
)
def test_reading_the_environment_is_seen(source: str, expected: bool) -> None:
    assert reads_environment(source) == expected


def test_the_scheduler_loads_neither_torch_nor_numpy() -> None:
    """In a fresh process, with every module of it."""
    script = """
import importlib, pkgutil, sys
from shoal import scheduler
names = [module.name for module in pkgutil.walk_packages(scheduler.__path__, "shoal.scheduler.")]
assert "shoal.scheduler.policies.fcfs" in names
for name in names:
    importlib.import_module(name)
print(*({"torch", "numpy"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
