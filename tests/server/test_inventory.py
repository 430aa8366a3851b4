"""`shoal models`: what is found, where, and why some of it cannot be served."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from shoal.model.checkpoint.find import BUNDLED, PACKAGED
from shoal.server.cli import models
from shoal.server.inventory import FoundModel, find_models
from shoal.server.sources import hub_cache
from tests.e2e.checkpoints import random_checkpoint
from tests.gguf_writer import write_gguf


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A copy of a checkpoint that can be served."""
    return Path(shutil.copytree(BUNDLED / "shoal-draft", tmp_path / "models" / "draft"))


def change(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def found_in(folder: Path) -> list[FoundModel]:
    return find_models(folder / "no cache", [folder])[str(folder)]


def test_what_has_a_name_comes_first(tmp_path: Path) -> None:
    by_name = find_models(tmp_path, [])["By name"]
    assert [model.model for model in by_name] == ["shoal-draft", "shoal-moe", *PACKAGED]
    moe = by_name[1]
    assert (moe.family, moe.num_parameters, moe.max_model_len, moe.precision, moe.reason) == (
        "mixtral",
        15_497_728,
        1024,
        "bfloat16",
        None,
    )
    assert moe.num_bytes == (BUNDLED / "shoal-moe" / "model.safetensors").stat().st_size


def test_a_package_that_is_missing_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "other", ("no_such_package", "a.gguf", "smollm2"))
    assert "is not installed: run `" in str(find_models(tmp_path, [])["By name"][-1].reason)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: change(path, model_type="mamba"), "config.json: model_type: 'mamba' is not supported"),
        (lambda path: change(path, quantization_config={"quant_method": "gptq"}), "quantized checkpoints"),
        (lambda path: (path / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json: expected a JSON object"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors"),
        (lambda path: (path / "model.safetensors").write_bytes(b"short"), "model.safetensors: truncated"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_a_broken_checkpoint_is_listed_with_the_reason(draft: Path, damage: Any, said: str) -> None:
    good = Path(shutil.copytree(draft, draft.with_name("good")))
    damage(draft)
    broken, whole = found_in(draft.parent)
    assert (broken.path, whole.path, whole.reason) == (str(draft), str(good), None)
    assert said in str(broken.reason) and len(str(broken.reason)) <= 300


def test_what_cannot_be_served_is_described_all_the_same(draft: Path) -> None:
    change(draft, architectures=["FalconForCausalLM"], model_type="falcon")
    (found,) = found_in(draft)
    assert (found.family, found.max_model_len, found.precision) == ("falcon", 1024, "bfloat16")
    assert found.num_parameters and found.num_bytes


def test_gguf_files(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "tiny")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "empty.gguf").touch()
    (folder / "other.gguf").write_bytes(b"GGUF" + bytes(40))
    fields = {"general.architecture": "qwen9", "qwen9.context_length": 77}
    write_gguf(folder / "qwen.gguf", source, edit=lambda metadata: metadata.update(fields))
    whole = write_gguf(folder / "whole.gguf", source, matrices=GGMLQuantizationType.F16)
    shutil.copy(whole, folder / "y.gguf")
    os.truncate(folder / "y.gguf", whole.stat().st_size - 1000)
    empty, other, qwen, good, short = found_in(folder)
    assert (good.reason, good.precision, good.max_model_len) == (None, "F16", 4096)
    assert "truncated" in str(short.reason)
    assert "cannot be read" in str(empty.reason)
    assert "GGUF" in str(other.reason)
    assert (qwen.family, qwen.max_model_len) == ("qwen9", 77)
    assert "'qwen9' is not supported" in str(qwen.reason)


def test_folders_are_searched_not_too_deep_and_not_where_they_hide(tmp_path: Path, draft: Path) -> None:
    deep, hidden, loop = tmp_path / "models/a/b/c/d/e", tmp_path / "models/.cache", tmp_path / "models/loop"
    shutil.copytree(draft, deep)
    shutil.copytree(draft, hidden)
    loop.symlink_to(tmp_path)
    assert [found.path for found in found_in(tmp_path / "models")] == [str(draft)]
    assert [found.path for found in found_in(deep)] == [str(deep)]


def test_the_cache_of_hugging_face(tmp_path: Path, draft: Path) -> None:
    """Files of a snapshot are links to blobs, and the last revision counts."""
    repository = tmp_path / "hub" / "models--fish--small"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in draft.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "hub" / "models--fish--half" / "snapshots").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--fish--food").mkdir()
    half, small = find_models(tmp_path / "hub", [])[f"Hugging Face cache, {tmp_path / 'hub'}"]
    assert (half.model, half.reason) == ("fish/half", "it holds no config.json and no .gguf file")
    assert (small.model, small.reason) == (str(snapshot), None)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "/home/fish/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}, "/old"),
        ({"HF_HUB_CACHE": "~/new", "HUGGINGFACE_HUB_CACHE": "/old"}, "/home/fish/new"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/fish", **environment}.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)


def test_the_command(tmp_path: Path, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    (draft / "tokenizer.json").unlink()
    listed = CliRunner().invoke(models, [str(draft)]).stdout
    assert f"Hugging Face cache, {tmp_path / 'none'}: none" in listed
    assert "no: tokenizer.json is missing" in listed
    found = json.loads(CliRunner().invoke(models, [str(draft), "--json"]).stdout)["models"]
    assert [(model["model"], model["can_serve"]) for model in found][-1] == (str(draft), False)
    assert found[0]["place"] == "By name"
