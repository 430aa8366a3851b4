"""A folder in the form that Hugging Face's tools write: `config.json`, `tokenizer.json`, `*.safetensors` and more."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.checkpoint.families import Tensors
from shoal.model.checkpoint.parts import Fields, TokenizerParts, Weights, zeros
from shoal.model.checkpoint.safetensors_file import read_safetensors
from shoal.scheduler.errors import CheckpointError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
# Files that a tokenizer can be made of.
TOKENIZERS = (TOKENIZER, "tokenizer.model", "vocab.json")

_GENERATION_CONFIG = "generation_config.json"
_POOLING = "1_Pooling/config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Buffers in some files, which the config determines.
_NOT_WEIGHTS = re.compile(r".*\.rotary_emb\.inv_freq")


class HuggingFaceFolder:
    """See `CheckpointFormat`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    def config(self) -> Fields:
        path = self.path / CONFIG
        return Fields(path, read_json(path))

    def generation_config(self) -> Fields:
        path = self.path / _GENERATION_CONFIG
        return Fields(path, read_json(path) if path.exists() else {})

    def pooling(self) -> Fields:
        path = self.path / _POOLING
        return Fields(path, read_json(path) if path.exists() else {})

    def tokenizer(self) -> TokenizerParts:
        # The engine process does not need the tokenizers package, which takes time to load.
        from shoal.model.checkpoint.hf_tokenizer import read_hf_tokenizer  # noqa: PLC0415

        return read_hf_tokenizer(self.path)

    def own_tensors(self, tensors: Tensors) -> Tensors:
        return tensors

    def weights(self) -> Weights:
        path, tensors = self._tensors()
        kept = {name: tensor for name, tensor in tensors.items() if not _NOT_WEIGHTS.fullmatch(name)}
        return Weights(path, kept, own_name=str)

    def outline(self) -> Weights:
        weights = self.weights()
        return replace(weights, tensors={name: zeros(own.shape, own.dtype) for name, own in weights.tensors.items()})

    def holds(self) -> dict[str, tuple[int, int]]:
        counts, sizes = Counter[str](), Counter[str]()
        for tensor in self._tensors()[1].values():
            name = "bfloat16" if tensor.dtype == np.uint16 else tensor.dtype.name
            counts[name] += 1
            sizes[name] += tensor.nbytes
        return {name: (count, sizes[name]) for name, count in counts.most_common()}

    def _tensors(self) -> tuple[Path, dict[str, NDArray[Any]]]:
        """The file that errors name (the single file, or the index of the shards), and the tensors by name."""
        folder = self.path
        if (folder / _WEIGHTS).exists():
            return folder / _WEIGHTS, read_safetensors(folder / _WEIGHTS)
        index = folder / _INDEX
        if not index.exists():
            raise CheckpointError(f"{folder}: holds neither {_WEIGHTS} nor {_INDEX}", param=_WEIGHTS)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map: expected an object of file names", param=_INDEX)
        tensors: dict[str, NDArray[Any]] = {}
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).is_file() or Path(shard).name != shard:
                raise CheckpointError(f"{index}: names the shard {shard}, which is not in the folder", param=_INDEX)
            tensors |= read_safetensors(folder / shard)
        for name, shard in weight_map.items():
            if name not in tensors:
                message = f"{folder / shard}: tensor {name} is missing, though {_INDEX} names it"
                raise CheckpointError(message, param=shard)
        return index, tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        CheckpointError: naming the file, if it cannot be read or holds something else.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}", param=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}", param=path.name)
    return value


def read_text(path: Path) -> str:
    """The text of the file.

    Raises:
        CheckpointError: naming the file, if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", param=path.name) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}", param=path.name) from error
