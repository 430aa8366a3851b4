"""The command that installs what an optional part needs."""

from __future__ import annotations

import sys

import pytest

from shoal import extras


def test_the_command_names_the_packages_of_the_extra_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["numpy>=2.0", "torch==2.13.0; extra == 'torch'", "a>=1; extra == 'load'", "b; extra == 'load'"]
    monkeypatch.setattr(extras, "requires", lambda name: required if name == "shoal" else None)
    monkeypatch.setattr(sys, "executable", "/home/a user/.venv/bin/python")
    run_pip = "'/home/a user/.venv/bin/python' -m pip install"
    assert extras.install_command("torch") == f"{run_pip} torch==2.13.0"
    assert extras.install_command("torch", "--no-deps") == f"{run_pip} --no-deps torch==2.13.0"
    assert extras.install_command("load") == f"{run_pip} 'a>=1' b"
