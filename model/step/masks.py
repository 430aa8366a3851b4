"""Which tokens the grammars of requests allow, a bit for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of a step, which are computed beside the forward pass.

    Attributes:
        bits: [num_masks, ceil(vocab_size / 32)] uint32, the lowest bit of a word first; to be read after `wait`.
        wait: returns when the bits are computed.
    """

    bits: NDArray[np.uint32]
    wait: Callable[[], object]

    def addends(self, numbers: NDArray[Any], vocab_size: int) -> NDArray[np.float32]:
        """[len(numbers), vocab_size], -inf for tokens that the masks of these numbers ban; -1 is no mask."""
        self.wait()
        masked = np.flatnonzero(numbers >= 0)
        words = self.bits[numbers[masked]].astype("<u4").view(np.uint8)
        allowed = np.unpackbits(words, axis=-1, count=vocab_size, bitorder="little").astype(np.bool_)
        addends = np.zeros((len(numbers), vocab_size), np.float32)
        addends[masked] = np.where(allowed, np.float32(0), np.float32(-np.inf))
        return addends
