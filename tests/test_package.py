"""What the package offers by itself, apart from its rooms."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys

import pytest

import shoal
from shoal import clients, extras


def test_the_names_of_the_package_are_those_of_the_rooms() -> None:
    assert shoal.ShoalClient is clients.ShoalClient
    assert shoal.AsyncShoalClient is clients.AsyncShoalClient
    assert shoal.ClientError is clients.ClientError
    assert all(getattr(shoal, name) is not None for name in shoal.__all__)
    assert not hasattr(shoal, "no_such_name")


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys; before = set(sys.modules); import shoal; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"httpx", "numpy", "click", "asyncio"} & set(ast.literal_eval(done.stdout))


def test_the_command_names_the_packages_of_the_extra_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["numpy>=2.0", "torch==2.13.0; extra == 'torch'", "a>=1; extra == 'load'", "b; extra == 'load'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required if name == "shoal" else None)
    monkeypatch.setattr(sys, "executable", "/home/a user/.venv/bin/python")
    run_pip = "'/home/a user/.venv/bin/python' -m pip install"
    assert extras.install_command("torch") == f"{run_pip} torch==2.13.0"
    assert extras.install_command("torch", "--no-deps") == f"{run_pip} --no-deps torch==2.13.0"
    assert extras.install_command("load") == f"{run_pip} 'a>=1' b"
