"""The formats of checkpoints behind one interface; the rest of the room does not depend on the format."""

from __future__ import annotations

from pathlib import Path

from shoal.model.checkpoint.gguf_checkpoint import GgufCheckpoint
from shoal.model.checkpoint.hf_folder import CONFIG, HuggingFaceFolder

CheckpointFormat = GgufCheckpoint | HuggingFaceFolder
"""Gives the parts of a checkpoint under the names of a Hugging Face folder.

`path` is the folder or file.  `config` and `generation_config` give the fields of the JSON files of these names (none
if nothing is recommended), `pooling` those of sentence-transformers' `1_Pooling/config.json`, `tokenizer` and `weights`
the rest.  `outline` gives the weights as zeros, and `holds` the number of tensors in each number format and their
bytes; both read headers alone.  `own_tensors` takes how folders of the model's family store its tensors, and gives how
this format does.  Every method raises CheckpointError, naming the file and the field, key or tensor that is missing,
malformed or not supported.
"""


def is_checkpoint(path: Path) -> bool:
    """Whether the path looks like a checkpoint; its content is not read."""
    return (path / CONFIG).is_file() or is_gguf(path)


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def open_checkpoint(checkpoint: Path | CheckpointFormat) -> CheckpointFormat:
    """The checkpoint at the path: a GGUF file, or a Hugging Face folder.

    An opened checkpoint is returned as it is: a caller that loads several parts opens it once, so that the header of a
    GGUF file is read once.

    Raises:
        CheckpointError: the file is not one of GGUF.
    """
    if not isinstance(checkpoint, Path):
        return checkpoint
    return GgufCheckpoint(checkpoint) if is_gguf(checkpoint) else HuggingFaceFolder(checkpoint)
