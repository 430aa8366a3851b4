"""A GGUF file is served as the folder that it was converted from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Server, run_shoal
from tests.gguf_writer import write_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-moe.F32.gguf", tiny_folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, path: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), "--model", str(path), "--num-blocks", "2048")
    yield server.wait_ready()
    server.close()


def test_answers_are_those_of_the_folder(server: Server, tiny: Server) -> None:
    prompt = "the cat sat on größer 楽しい 👍 1234"
    assert server.get("/v1/models").json()["data"][0]["id"] == "tiny-moe.F32"
    assert server.tokens(prompt) == tiny.tokens(prompt)
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 7}):
        params = sampling | {"max_tokens": 40, "ignore_eos": True}
        assert server.text(prompt, **params) == tiny.text(prompt, **params)
        ours, theirs = server.chat(prompt, **params), tiny.chat(prompt, **params)
        assert ours["choices"] == theirs["choices"]
        assert ours["usage"] == theirs["usage"]


def test_a_damaged_file_is_refused_with_one_line(tmp_path: Path, path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:-1000])
    code, printed = run_shoal(tmp_path, "serve", "--log-level", "error", "--model", str(short))
    assert code == 2, printed
    (line,) = printed.splitlines()
    assert line.startswith(f"shoal serve: {short}: tensor ") and ": truncated: " in line
