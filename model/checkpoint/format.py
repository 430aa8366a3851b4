"""The formats that checkpoints come in, behind one interface; all else in this room does not know which it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from shoal.model.checkpoint.gguf_checkpoint import GgufCheckpoint
from shoal.model.checkpoint.hf_folder import CONFIG, HuggingFaceFolder
from shoal.model.checkpoint.parts import Fields, TokenizerParts, Weights


class CheckpointFormat(Protocol):
    """Gives the parts of a checkpoint in the words of a Hugging Face folder.

    Every method raises CheckpointError, naming the file and the field, key or tensor that is missing, malformed or not
    supported.
    """

    def config(self) -> Fields:
        """The fields of `config.json`."""
        ...

    def generation_config(self) -> Fields:
        """The fields of `generation_config.json`; none if nothing is recommended."""
        ...

    def tokenizer(self) -> TokenizerParts: ...

    def weights(self) -> Weights: ...


def is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint at the path, by its look."""
    return (path / CONFIG).is_file() or is_gguf(path)


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def open_checkpoint(path: Path) -> CheckpointFormat:
    """The checkpoint at the path: a GGUF file, or a Hugging Face folder.

    Raises:
        CheckpointError: the file is not one of GGUF.
    """
    return GgufCheckpoint(path) if is_gguf(path) else HuggingFaceFolder(path)
