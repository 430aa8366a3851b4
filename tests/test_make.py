"""The Makefile, with a stand-in for Python that installs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = """\
#!/bin/sh
case "$1 $2" in
    "-c "*) exit ${TOO_OLD:-0};;
    "-m venv") mkdir -p .venv/bin; for name in python pip shoal; do cp "$0" .venv/bin/$name; done;;
    "-m pip") echo "$@" >> calls; until [ -e go ]; do sleep 0.02; done;;
    "-m pytest") echo "$@" >> calls; echo "output of $@"; case "$@" in *${FAILS:-none}*) exit 1;; esac;;
    "-m shoal.model.native.build") echo "$@" >> calls; exit ${NO_COMPILER:-0};;
esac
"""

pytestmark = pytest.mark.skipif(not (shutil.which("make") and shutil.which("flock")), reason="no make, or no flock")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone of which only the Makefile is real."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(folder: Path, *args: str) -> subprocess.Popen[str]:
    """The make in the folder, which is no part of the one that may have started the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "PYTHON=./python", *args]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and the rest of what it prints."""
    printed, _ = process.communicate()
    return process.returncode, printed


def calls(folder: Path) -> list[str]:
    """The arguments of each call of Python."""
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("target", ["native", "serve"])
def test_two_at_once_take_turns_and_install_once(target: str, folder: Path) -> None:
    first = make(folder, target)
    while not (folder / "calls").exists():
        assert first.poll() is None, finish(first)
        time.sleep(0.02)
    second = make(folder, target)
    assert second.stdout is not None
    assert second.stdout.readline() == "make: waiting for another make in this folder\n"
    (folder / "go").touch()
    assert [finish(first)[0], finish(second)[0]] == [0, 0]
    install, *builds = calls(folder)
    assert install == "-m pip install -qq --disable-pip-version-check --editable ."
    assert builds == ["-m shoal.model.native.build --only best"] * 2


def test_it_says_what_it_installs_and_only_when_it_does(folder: Path) -> None:
    (folder / "go").touch()
    code, printed = finish(make(folder, "native"))
    assert (code, printed.startswith("make: installing into .venv: Shoal with what it needs to serve (40 MB)")) == (
        0,
        True,
    )
    assert finish(make(folder, "native")) == (0, "")


def test_a_python_that_is_too_old(folder: Path) -> None:
    code, printed = finish(make(folder, "serve", "TOO_OLD=1"))
    assert code == 2
    assert "Shoal needs Python 3.11 or newer; name one: make serve PYTHON=python3.12" in printed
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize(
    ("args", "is_installed"),
    [
        ([], False),
        (["ARGS=--port 9000"], False),
        (["ARGS=--backend torch"], True),
        (["ARGS=--backend=torch"], True),
        (["ARGS=--device cuda:1"], True),
        (["NO_COMPILER=1"], True),
    ],
    ids=str,
)
def test_torch_is_installed_where_it_is_needed(folder: Path, args: list[str], is_installed: bool) -> None:
    (folder / "go").touch()
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(folder / "python", folder / ".venv/bin/shoal")
    code, printed = finish(make(folder, "serve", *args))
    assert code == 0, printed
    assert any(call.endswith(".[torch]") for call in calls(folder)) == is_installed


@pytest.mark.parametrize("target", ["test", "test-all", "check"])
@pytest.mark.parametrize("fails", [None, "pytest tests/e2e", "pytest --ignore"])
def test_tests_with_servers_run_beside_the_others(target: str, fails: str | None, folder: Path) -> None:
    (folder / "go").touch()
    (folder / ".venv/bin").mkdir(parents=True)
    for tool in ("ruff", "mypy"):
        shutil.copy(folder / "python", folder / ".venv/bin" / tool)
    code, printed = finish(make(folder, target, *([f"FAILS={fails}"] if fails else [])))
    assert (code == 0) == (fails is None), printed
    options = " -m " if target == "test-all" else ""
    runs = [f"-m pytest tests/e2e{options}", f"-m pytest --ignore tests/e2e{options}"]
    assert sorted(call for call in calls(folder) if call.startswith("-m pytest")) == sorted(runs)
    assert all(f"output of {run}\n" in printed for run in runs)


def test_with_arguments_there_is_one_run(folder: Path) -> None:
    (folder / "go").touch()
    code, printed = finish(make(folder, "test", "ARGS=tests/server"))
    assert code == 0, printed
    assert calls(folder)[-1] == "-m pytest tests/server"


def test_clean_leaves_the_checkpoints_of_training(folder: Path) -> None:
    rooms = [path.name for path in (ROOT / "src/shoal").iterdir() if path.is_symlink()]
    for name in (*rooms, "bench", "tests", "src"):
        (folder / name / "part" / "__pycache__").mkdir(parents=True)
    made = [".mypy_cache", ".ruff_cache", ".hypothesis", ".pytest_cache", ".venv/bin", "dist", "loadtest-results"]
    for name in (*made, "shoal-profile", "model/native/objects", ".train"):
        (folder / name).mkdir(parents=True)
    (folder / "model/native/libshoal-generic.so").touch()
    code, printed = finish(make(folder, "clean"))
    assert code == 0
    assert "make: .train stays, the checkpoints of training; remove it with rm -r .train" in printed
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert left == {
        *("Makefile", "pyproject.toml", "python", ".train", "model/native"),
        *(f"{name}{end}" for name in (*rooms, "bench", "tests", "src") for end in ("", "/part")),
    }
