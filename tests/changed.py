"""`python -m tests.changed` lists the tests of what has changed since origin/main, or since HEAD where there is none.

First come the files of tests that changed, and those that import a changed module by its name.  Then come the others of
the same room.  Tests with a real server process are left out unless they changed themselves.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.test_rooms import ROOT, imports

ALWAYS = "tests/test_rooms.py"


def changed_files() -> list[str]:
    """The files that differ, relative to the root: committed, in the work tree, and unknown to git."""
    base = _git("merge-base", "HEAD", "origin/main") or ["HEAD"]
    return _git("diff", "--name-only", *base) + _git("ls-files", "--others", "--exclude-standard")


def affected_by(changed: Iterable[str]) -> list[str]:
    """The files of tests for files that have changed, the nearest first; all paths are relative to the root."""
    changed = set(changed)
    modules = {_module(path) for path in changed if path.endswith(".py")}
    rooms = {
        "tests/training" if path.startswith("model/training/") else f"tests/{Path(path).parts[0]}" for path in changed
    }
    nearest, others = {ALWAYS}, set()
    for file in ROOT.glob("tests/**/test_*.py"):
        path = file.relative_to(ROOT).as_posix()
        if path in changed:
            nearest.add(path)
        elif not path.startswith("tests/e2e/"):
            imported = imports(path, file.read_text("utf-8"))
            if any(f"{name}.".startswith(f"{module}.") for name in imported for module in modules):
                nearest.add(path)
            elif path.rpartition("/")[0] in rooms:
                others.add(path)
    return [*sorted(nearest), *sorted(others)]


def _module(path: str) -> str:
    """The name by which a file is imported."""
    parts = Path(path.removeprefix("src/")).with_suffix("").parts
    rooms = () if parts[0] in ("tests", "bench", "shoal") else ("shoal",)
    return ".".join([*rooms, *parts]).removesuffix(".__init__")


def _git(*args: str) -> list[str]:
    """The lines that git prints; none if it fails."""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()


if __name__ == "__main__":
    print(*affected_by(changed_files()))
