"""What the start of a server reads of a checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.model.checkpoint import gguf_checkpoint
from shoal.model.checkpoint.gguf_file import GgufFile, read_gguf
from shoal.model.checkpoint.load import load_checkpoint
from shoal.server.settings import resolve
from shoal.server.setup import build_service
from tests.e2e.checkpoints import random_checkpoint
from tests.gguf_writer import write_gguf


def test_each_process_reads_the_header_of_a_gguf_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_checkpoint(tmp_path / "folder"))
    read: list[Path] = []

    def counted(path: Path) -> GgufFile:
        read.append(path)
        return read_gguf(path)

    async def start() -> None:
        service, _ = build_service(resolve({"model": str(path)}))
        assert service.config.vocab_size > 0

    monkeypatch.setattr(gguf_checkpoint, "read_gguf", counted)
    asyncio.run(start())
    assert read == [path], "the API process"
    load_checkpoint(path)
    assert read == [path] * 2, "the engine process"
