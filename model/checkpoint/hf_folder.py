"""A folder in the form that Hugging Face's tools write: `config.json`, `tokenizer.json`, `*.safetensors` and more."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from shoal.model.checkpoint.parts import Fields, TokenizerParts, Weights
from shoal.model.checkpoint.safetensors_file import read_safetensors
from shoal.scheduler.errors import CheckpointError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

_GENERATION_CONFIG = "generation_config.json"
_POOLING = "1_Pooling/config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
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
        import tokenizers  # noqa: PLC0415  (the engine process does not need it, and it takes time to load)

        path = self.path / TOKENIZER
        config_path = self.path / _TOKENIZER_CONFIG
        config = read_json(config_path) if config_path.exists() else {}
        read_json(path)  # for its messages: the library's do not name the file
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path}: not a tokenizer: {error}", param=path.name) from error
        return TokenizerParts(
            tokenizer=tokenizer,
            special_tokens=_special_tokens(config),
            chat_templates=_chat_templates(self.path, config),
        )

    def weights(self) -> Weights:
        path, tensors = self._tensors()
        kept = {name: tensor for name, tensor in tensors.items() if not _NOT_WEIGHTS.fullmatch(name)}
        return Weights(path, kept, own_name=str)

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
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}", param=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}", param=path.name)
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", param=path.name) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}", param=path.name) from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens of a tokenizer_config.json by name; each is written as text or as an object with `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: from their own file, else from the config, which holds one or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return {"default": _read_text(path)}
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError) as error:
        message = f"{folder / _TOKENIZER_CONFIG}: chat_template: expected a template or a list of {{name, template}}"
        raise CheckpointError(message, param=_TOKENIZER_CONFIG) from error
