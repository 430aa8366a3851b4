"""`python -m tests.parties [NAMES]`: runs the scripts of real clients against one real server.

It prints a table, and exits with 1 if a script failed, or if none could be run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click

from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.testing import ServerProcess
from shoal.testing.server import free_port
from tests.parties.environments import NotInstallableError, command, make_environment
from tests.parties.table import FOLDER, PARTIES, Party

MODEL = "shoal-moe"
CONTEXT = 16384  # some agents begin with thousands of tokens, and their scripts are about form, not sense
SCRIPT_SECONDS = 600
OUTSIDE = "http://127.0.0.1:9"  # where nobody listens: what is not asked of the server is asked of no one
QUIET = {
    "AGNO_TELEMETRY": "false",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OTEL_SDK_DISABLED": "true",
}


class Ended(NamedTuple):
    """How the script of a client ended."""

    party: Party
    how: str
    seconds: float


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([party.name for party in PARTIES]))
def main(names: Sequence[str]) -> None:
    """Run the scripts of the clients with these NAMES, or of all."""
    page = f"http://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as temp, server(Path(temp), page) as started:
        variables = environment(started, Path(temp), page)
        ended = [try_out(party, started, variables) for party in PARTIES if not names or party.name in names]
    rows = [("client", "version", "", "seconds")]
    rows += [(one.party.name, one.party.version, one.how, f"{one.seconds:.1f}") for one in ended]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *texts, seconds in rows:
        print("  ".join([*map(str.ljust, texts, widths), seconds.rjust(widths[-1])]))
    results = {one.how for one in ended}
    sys.exit("failed" in results or "passed" not in results)


@contextmanager
def server(folder: Path, page: str) -> Iterator[ServerProcess]:
    """A server with the bundled model, whose context is longer than the model has learnt to use.

    Args:
        folder: an empty one.
        page: the origin of pages that may use the server.
    """
    model = folder / "model"
    model.mkdir()
    for file in resolve_checkpoint(MODEL).iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    (folder / "empty.toml").touch()
    options = [f"--model={model}", f"--served-model-name={MODEL}", f"--config={folder / 'empty.toml'}"]
    options += ["--max-queue-seconds=0", f"--cors-origins={page}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    with ServerProcess(options, folder / "log", environment=environment) as started:
        yield started


def try_out(party: Party, started: ServerProcess, variables: dict[str, str]) -> Ended:
    """Run the script of a client, and print what it printed if it failed."""
    try:
        words = command(party, make_environment(party))
    except NotInstallableError as error:
        print(f"{party.name}: cannot be installed: {error}", flush=True)
        return Ended(party, "not installable", 0.0)
    begun = time.monotonic()
    code, printed = run(words, variables)
    how = "failed" if code else "passed"
    print(f"{party.name}: {how}", flush=True)
    if code:
        print(printed, f"exit code {code}; the server's log:", started.log, sep="\n", flush=True)
    return Ended(party, how, time.monotonic() - begun)


def environment(started: ServerProcess, home: Path, page: str) -> dict[str, str]:
    """The variables of a script's process: the server is where clients look, and all else is nowhere."""
    return QUIET | {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(FOLDER / "given"),
        "OPENAI_BASE_URL": started.base_url,
        "OPENAI_API_KEY": "unused",
        "ANTHROPIC_BASE_URL": started.url,
        "ANTHROPIC_API_KEY": "unused",
        "SHOAL_MODEL": MODEL,
        "SHOAL_MODEL_FOLDER": str(home / "model"),
        "SHOAL_PAGE": page,
        "HTTP_PROXY": OUTSIDE,
        "HTTPS_PROXY": OUTSIDE,
        "NO_PROXY": "127.0.0.1,localhost",
    }


def run(words: Sequence[str], variables: dict[str, str]) -> tuple[int, str]:
    """Exit code of a script, and what it printed; it is ended when its time is over."""
    with subprocess.Popen(
        words,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=SCRIPT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            printed += f"\nno end after {SCRIPT_SECONDS} s"
        return process.returncode, printed


if __name__ == "__main__":
    main()
