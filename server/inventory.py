"""The models on this machine, and whether they can be served, as far as their headers say it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from shoal.model.checkpoint.config import load_config
from shoal.model.checkpoint.find import BUNDLED, PACKAGED, resolve_checkpoint
from shoal.model.checkpoint.format import CheckpointFormat, is_checkpoint, is_gguf, open_checkpoint
from shoal.model.checkpoint.gguf_file import read_gguf
from shoal.model.checkpoint.hf_folder import CONFIG, TOKENIZER, TOKENIZERS, HuggingFaceFolder, read_json
from shoal.scheduler.errors import CheckpointError
from shoal.terminal import in_words

MAX_DEPTH, MAX_FOLDERS = 4, 10_000
MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class FoundModel:
    """A model, and what its headers say; None is what they do not say.

    Attributes:
        model: what `shoal serve --model` takes.
        max_model_len: tokens of its context.
        precision: number format of most of its weights.
        num_bytes: of the files of its weights.
        reason: why it cannot be served; None if it can.
    """

    model: str
    path: str | None = None
    family: str | None = None
    num_parameters: int | None = None
    max_model_len: int | None = None
    precision: str | None = None
    num_bytes: int | None = None
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "can_serve": self.reason is None}

    def as_row(self) -> dict[str, object]:
        """The row of a table for people."""
        return {
            "model": self.model,
            "family": self.family,
            "parameters": in_words(self.num_parameters),
            "context": self.max_model_len,
            "precision": self.precision,
            "size": in_words(self.num_bytes, "B"),
            "can be served": "yes" if self.reason is None else f"no: {self.reason}",
        }


def find_models(cache: Path, folders: Iterable[Path]) -> dict[str, list[FoundModel]]:
    """The models by the place where they are.

    Args:
        cache: of Hugging Face's tools.
        folders: to look into; a checkpoint counts as a folder of its own.
    """
    names = [*sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}")), *PACKAGED]
    found = {
        "By name": [_named(name) for name in names],
        f"Hugging Face cache, {cache}": [model for repository in _repositories(cache) for model in repository],
    }
    for folder in folders:
        found[str(folder)] = [_inspect(path, str(path)) for path in _checkpoints(folder)]
    return found


def _named(name: str) -> FoundModel:
    try:
        return _inspect(resolve_checkpoint(name), name)
    except CheckpointError as error:
        return FoundModel(name, reason=_one_line(error.message))


def _repositories(cache: Path) -> Iterator[list[FoundModel]]:
    """The checkpoints of each repository in the cache, in the revision that was downloaded last."""
    for repository in sorted(cache.glob("models--*")):
        snapshots = sorted((repository / "snapshots").glob("*/"), key=lambda path: path.stat().st_mtime)
        checkpoints = list(_checkpoints(snapshots[-1])) if snapshots else []
        missing = FoundModel(repository.name.removeprefix("models--").replace("--", "/"), str(repository))
        yield [_inspect(path, str(path)) for path in checkpoints] or [
            replace(missing, reason=f"it holds no {CONFIG} and no .gguf file")
        ]


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoint folders and GGUF files at and below the folder, in order; hidden folders are passed over."""
    if is_gguf(folder):
        yield folder
    for number, (root, inner, files) in enumerate(os.walk(folder)):
        if number == MAX_FOLDERS:
            return
        path = Path(root)
        is_deep = len(path.relative_to(folder).parts) >= MAX_DEPTH
        inner[:] = [] if is_deep else sorted(name for name in inner if not name.startswith("."))
        yield from filter(is_checkpoint, (path, *(path / name for name in sorted(files) if name.endswith(".gguf"))))


def _inspect(path: Path, model: str) -> FoundModel:
    found = FoundModel(model, str(path))
    try:
        found = replace(found, **(_facts_of_gguf(path) if is_gguf(path) else _facts_of_folder(path)))
        opened = open_checkpoint(path)
        load_config(opened)
        return replace(found, **_check_weights(opened))
    except Exception as error:  # whatever is wrong with one must not hide the others
        message = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        return replace(found, reason=_one_line(message.replace(f"{path}/", "", 1).removeprefix(f"{path}: ")))


def _facts_of_gguf(path: Path) -> dict[str, Any]:
    file = read_gguf(path)
    family = file.metadata.get("general.architecture")
    return {
        "family": _text(family),
        "num_parameters": sum(prod(tensor.shape) for tensor in file.tensors.values()),
        "max_model_len": _count(file.metadata.get(f"{family}.context_length")),
        "num_bytes": path.stat().st_size,
    }


def _facts_of_folder(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG)
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    facts: dict[str, Any] = {
        "family": _text(config.get("model_type")),
        "max_model_len": _count(config.get("max_position_embeddings")),
        "precision": _text(method or config.get("dtype") or config.get("torch_dtype")),
        "num_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")) or None,
    }
    with suppress(CheckpointError):
        facts["num_parameters"] = sum(tensor.size for tensor in HuggingFaceFolder(path).weights().tensors.values())
    return facts


def _check_weights(opened: CheckpointFormat) -> dict[str, Any]:
    """Raise CheckpointError if the headers of the weights say that they cannot be loaded; return what else they say."""
    if isinstance(opened, HuggingFaceFolder):
        opened.weights()
        if not any((opened.path / name).is_file() for name in TOKENIZERS):
            raise CheckpointError(f"{TOKENIZER} is missing", param=TOKENIZER)
        return {}
    # The package that it loads takes 0.1 s.
    from shoal.model.checkpoint.gguf_weights import stored_tensors  # noqa: PLC0415

    types: Counter[str] = Counter()
    for tensor in stored_tensors(read_gguf(opened.path)):
        types[tensor.format.name] += prod(tensor.info.shape)
    return {"precision": max(types, key=types.__getitem__, default=None)}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _one_line(message: str) -> str:
    return " ".join(message.split())[:MAX_REASON_CHARS]
