"""An environment for each client, made once: of Python's `venv`, or a folder of npm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.parties.table import Party

FOLDER = Path(__file__).parents[2] / ".venv-clients"
INSTALL_SECONDS = 1800


class NotInstallableError(Exception):
    """A client cannot be installed here; the message says why."""


def make_environment(party: Party) -> Path:
    """The folder with what the client needs; nothing is done if it is there.

    Raises:
        NotInstallableError: npm or a program is missing, or what is installed from does not have it.
    """
    if party.program and shutil.which(party.program) is None:
        raise NotInstallableError(f"there is no {party.program} on the path")
    folder = FOLDER / party.name
    installed = folder / "installed"
    wanted = "\n".join(party.requirements)
    if not installed.exists() or installed.read_text() != wanted:
        print(f"{party.name}: installing {', '.join(party.requirements)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if party.is_node:
            options = ("--no-audit", "--no-fund", *(("--omit=optional",) if party.is_bare else ()))
            _run("npm", "install", *options, "--prefix", folder, *party.requirements)
        else:
            _run(party.program or sys.executable, "-m", "venv", folder)
            install = (folder / "bin/python", "-m", "pip", "install", "-q", "--no-compile")
            if party.is_bare:
                _run(*install, "--no-deps", party.requirements[0])
            _run(*install, *party.requirements[party.is_bare :])
        installed.write_text(wanted)
    return folder


def command(party: Party, folder: Path) -> list[str]:
    """What runs the script of a client in its environment."""
    if party.is_node:  # where node looks for modules depends on the script's own place
        return ["node", str(shutil.copy(party.script, folder))]
    return [str(folder / "bin/python"), "-P", str(party.script)]  # -P: a script has its client's name


def _run(*words: str | Path) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstallableError(str(error)) from error
    if done.returncode:
        raise NotInstallableError("\n".join((done.stdout + done.stderr).splitlines()[-10:]))
