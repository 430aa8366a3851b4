"""`shoal chat` with a real server."""

from __future__ import annotations

import subprocess

from tests.e2e.conftest import StartServer
from tests.e2e.harness import PATIENCE, SHOAL, clean_environment


def test_a_conversation_outgrows_the_context(start: StartServer) -> None:
    """The model never ends by itself: each answer is a quarter of the context, and all turns together exceed it."""
    server = start("--max-model-len", "256").wait_ready()
    done = subprocess.run(
        [SHOAL, "chat", "--url", f"{server.url}/v1/", "--system", "Count."],
        env=clean_environment(NO_PROXY="127.0.0.1"),
        input="one\ntwo\nthree\nfour\nfive\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[64 tokens in ") == 5
    assert "[the context is full: the oldest turns are forgotten, 1 of " in done.stderr
