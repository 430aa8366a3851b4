"""Servers: `main` runs the bundled model, `tiny` random weights, `strict` a known text under tight limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.checkpoints import cycle_checkpoint, random_checkpoint
from tests.e2e.harness import Server

StartServer = Callable[..., Server]
API_KEYS = ("first-key", "second-key", "dritter-Schlüssel")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def cycle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cycle_checkpoint(tmp_path_factory.mktemp("checkpoints") / "cycle")


@pytest.fixture(scope="session")
def main(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model at a port that the server chose and announced; no test may depend on what it says."""
    server = Server(tmp_path_factory.mktemp("main"), port=0)
    yield server.wait_ready()
    server.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Server]:
    """Random weights, of which transformers can say what the tokens must be; unknown fields are refused."""
    server = Server(
        tmp_path_factory.mktemp("server"),
        "--model",
        str(tiny_folder),
        "--num-blocks",
        "2048",
        "--unknown-fields",
        "refuse",
    )
    yield server.wait_ready()
    server.close()


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory, cycle_folder: Path) -> Iterator[Server]:
    """A known text; two requests run, one waits, and an API key is needed."""
    keys = f"--api-keys={','.join(API_KEYS)}"
    limits = ("--max-num-seqs", "2", "--max-num-waiting", "1", "--num-blocks", "2048")
    server = Server(tmp_path_factory.mktemp("server"), "--model", str(cycle_folder), keys, *limits)
    server.http.headers["authorization"] = f"Bearer {API_KEYS[1]}"
    yield server.wait_ready()
    server.close()


@pytest.fixture
def start(tmp_path: Path, cycle_folder: Path) -> Iterator[StartServer]:
    """Start servers of the known text for one test, with whatever settings; they are not waited for."""
    servers: list[Server] = []

    def start_one(*args: str) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, "--model", str(cycle_folder), "--num-blocks", "2048", *args))
        return servers[-1]

    yield start_one
    for server in servers:
        server.close()
