"""How a checkpoint makes one vector of the hidden states of a text."""

from __future__ import annotations

from pathlib import Path

from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint

# Names as sentence-transformers writes them, as a value or as flags `pooling_mode_NAME`.
_METHODS = {"lasttoken": "last", "mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
_FLAG = "pooling_mode_"


def load_pooling(checkpoint: Path | CheckpointFormat) -> str:
    """A method of `Pooling`, or the names of others, joined by "+"; "last" where the checkpoint says nothing.

    Raises:
        CheckpointError: the file that says it is malformed.
    """
    fields = open_checkpoint(checkpoint).pooling()
    named = fields.get("pooling_mode") or []
    names: list[str] = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.error("pooling_mode", f"expected a name or a list of names, found {named!r}")
    flags = [
        name.removeprefix(_FLAG) for name, flag in fields.values.items() if name.startswith(_FLAG) and flag is True
    ]
    return "+".join(_METHODS.get(name, name) for name in names + flags) or "last"
