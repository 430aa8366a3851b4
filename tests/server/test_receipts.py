"""Receipts say which checkpoint answered, and nothing of one that they do not know."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from shoal.receipts import receipt_sha256, tokens_sha256
from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import SamplingParams
from shoal.server.fingerprint import content_sha256, fingerprint
from shoal.server.receipts import Answered, Receipts
from shoal.server.settings import Settings, resolve

PARAMS = SamplingParams(max_tokens=3, temperature=0.5, seed=7)


def answered(body: bytes = b'{"prompt": "a", "top_p": 1.0}') -> Answered:
    return Answered("/v1/completions", body, {"top_p": 0.5}, [PARAMS, PARAMS], [[1], [2]], [[5, 6], []])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0123456789" * 10**6)
    return resolve({"model": str(tmp_path)})


def receipts(settings: Settings) -> Receipts:
    return Receipts(settings, "fish", fingerprint(Path(settings.model), settings))


def test_a_receipt_is_whole_and_its_hashes_are_right(settings: Settings) -> None:
    receipt = asyncio.run(receipts(settings).write(answered()))
    assert (receipt.request, receipt.prompts) == ({"prompt": "a", "top_p": 0.5}, [[1], [2]])
    assert receipt.sampling["temperature"] == 0.5
    assert (receipt.sampling["seed"], receipt.sampling["max_tokens"]) == (7, 3)
    assert [(one.num_tokens, one.sha256) for one in receipt.outputs] == [
        (2, tokens_sha256([5, 6])),
        (0, tokens_sha256([])),
    ]
    assert receipt.model.sha256 == content_sha256(Path(settings.model))
    assert receipt.model.settings["quantization"] == "none"
    assert receipt.sha256 == receipt_sha256(json.loads(msgspec.json.encode(receipt)))


def test_every_byte_of_a_checkpoint_counts_and_no_setting(settings: Settings) -> None:
    folder = Path(settings.model)
    before = content_sha256(folder)
    assert before == content_sha256(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[5_000_001] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert content_sha256(folder) != before


def test_a_checkpoint_that_was_changed_since_the_start_has_no_hash(settings: Settings) -> None:
    """The hash is made once, of what is there when the first receipt is written."""
    before, gone = receipts(settings), receipts(settings)
    (Path(settings.model) / "config.json").write_text("[]")
    assert asyncio.run(before.write(answered())).model.sha256 is None
    for file in Path(settings.model).iterdir():
        file.unlink()
    Path(settings.model).rmdir()
    assert asyncio.run(gone.write(answered())).model.sha256 is None


def test_a_body_that_cannot_be_given_back_is_refused(settings: Settings) -> None:
    with pytest.raises(InvalidRequestError, match="receipt: the body"):
        asyncio.run(receipts(settings).write(answered(b'{"a": "\xff"}')))
