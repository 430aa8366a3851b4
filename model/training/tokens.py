"""Token arrays: all documents of a set as one array of token ids, and the windows of it that make a batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shoal.scheduler.errors import ConfigError

from .corpus import Document
from .tokenizer import END_OF_TEXT, END_OF_TURN, ROLES, special_id

Tokens = NDArray[np.uint16]

_ENCODE_AT_ONCE = 1000


def encode_documents(documents: list[Document], tokenizer: Tokenizer) -> Tokens:
    """The token ids of the documents one after the other, each after an end-of-text token.

    The turns of an instruction pair have the chat template's format.
    """
    parts = []
    for start in range(0, len(documents), _ENCODE_AT_ONCE):
        some = documents[start : start + _ENCODE_AT_ONCE]
        turns = [turn for document in some for turn in document.turns]
        encodings = iter(tokenizer.encode_batch(turns, add_special_tokens=False))
        ids = [
            token_id
            for document in some
            for token_id in _join([next(encodings).ids for _ in document.turns], tokenizer)
        ]
        parts.append(np.array(ids, dtype=np.uint16))
    return np.concatenate(parts)


def _join(turns: list[list[int]], tokenizer: Tokenizer) -> Iterator[int]:
    yield special_id(tokenizer, END_OF_TEXT)
    if len(turns) == 1:
        yield from turns[0]
        return
    for role, turn in zip(ROLES[-len(turns) :], turns, strict=True):
        yield special_id(tokenizer, f"<|{role}|>")
        yield from turn
        yield special_id(tokenizer, END_OF_TURN)


def save_tokens(folder: Path, sets: dict[str, Tokens], tokenizer_fingerprint: str) -> None:
    """Write each set as NAME.npy, and the fingerprint of their tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in sets.items():
        np.save(folder / f"{name}.npy", tokens)
    (folder / "tokenizer.json").write_text(json.dumps({"sha256": tokenizer_fingerprint}) + "\n")


def save_array(path: Path, tokens: Tokens) -> None:
    """Write an array completely or not at all."""
    unfinished = path.with_suffix(".unfinished.npy")
    np.save(unfinished, tokens)
    unfinished.replace(path)


def load_tokens(folder: Path, name: str, tokenizer_fingerprint: str) -> Tokens:
    """Map a set into memory; ConfigError if it was made with another tokenizer."""
    made_with = json.loads((folder / "tokenizer.json").read_text())["sha256"]
    if made_with != tokenizer_fingerprint:
        raise ConfigError(f"the token arrays in {folder} were made with another tokenizer", param="tokenizer.json")
    tokens: Tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
    return tokens


def batch_of_windows(tokens: Tokens, length: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The windows [batch_size, length + 1] of a step; the last token of a window is the first of the next one.

    Every epoch visits every window once, in an order that depends only on the seed and the epoch.
    """
    num_windows = count_windows(tokens, length)
    rows = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(index, num_windows)
        window = _order(num_windows, seed, epoch)[place]
        rows.append(tokens[window * length : (window + 1) * length + 1])
    return np.stack(rows).astype(np.int64)


@lru_cache(maxsize=2)  # a batch reaches into the next epoch at most
def _order(num_windows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def count_windows(tokens: Tokens, length: int) -> int:
    """How many windows of `length` tokens and their targets there are; ConfigError if there is none."""
    num_windows = (len(tokens) - 1) // length
    if num_windows < 1:
        raise ConfigError(f"{len(tokens)} tokens are too few for a sequence of {length}", param="sequence_length")
    return num_windows
