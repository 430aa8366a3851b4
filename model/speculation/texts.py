"""Recent texts of many requests, in which runs of tokens are found at once."""

from __future__ import annotations

import numpy as np

from shoal.model.step.batch import Int32

SIZES = (8, 4)  # numbers of tokens of the runs that are found
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no power of it loses bits
_POWERS = [pow(_MULTIPLIER, age, 1 << 64) for age in range(1, SIZES[0] + 1)]
_ALL_BITS = (1 << 64) - 1
_NO_TOKEN = -1  # stands behind each text


class Texts:
    """The last tokens of texts; when there is no more room the older half goes.

    For each size of runs a table says, by a hash of the run, where the last one with this hash ends.  An entry is no
    more than a hint: the tokens themselves are compared.

    Args:
        num_tokens: room for tokens, a power of two, each of which takes 20 bytes: 1.3 MB in all.
    """

    def __init__(self, num_tokens: int = 1 << 16) -> None:
        self._token_ids = np.full(num_tokens, _NO_TOKEN, np.int32)
        self._ends = {size: np.zeros(2 * num_tokens, np.int32) for size in SIZES}
        self._shift = 65 - (2 * num_tokens).bit_length()  # takes a hash to an index of a table
        # Python reads single items of views in a third of the time.
        self._bytes = self._token_ids.data.cast("B")
        self._views = {size: table.data for size, table in self._ends.items()}
        self._num_tokens = 0

    def add(self, token_ids: Int32) -> None:
        """Keep a text; of one that takes more than half of the room, the end."""
        half = len(self._token_ids) // 2
        token_ids = token_ids[1 - half :]
        if self._num_tokens + len(token_ids) >= 2 * half:
            self._token_ids[:half] = self._token_ids[half:]
            self._num_tokens -= half
            for table in self._ends.values():
                np.subtract(table, half, out=table)
        start, end = self._num_tokens, self._num_tokens + len(token_ids)
        self._token_ids[start:end] = token_ids
        self._token_ids[end] = _NO_TOKEN
        self._num_tokens = end + 1
        words = token_ids[:-1].astype(np.uint64)  # nothing follows the last one
        hashes = np.zeros(len(words), np.uint64)
        for age, power in enumerate(_POWERS[: len(words)], 1):
            hashes[age - 1 :] += words[: len(words) - age + 1] * np.uint64(power)
            if age in self._ends:
                ends = np.arange(start + age, end, dtype=np.int32)
                self._ends[age][hashes[age - 1 :] >> np.uint64(self._shift)] = ends

    def find(self, text: Int32) -> dict[int, int]:
        """Return by size where the last run of this size ends that `text` ends with, if it is followed by more."""
        run = text[-SIZES[0] :].tobytes()
        found, hashed = {}, 0
        for age, token_id in enumerate(text[: -SIZES[0] - 1 : -1].tolist(), 1):
            hashed += token_id * _POWERS[age - 1]
            if age in self._views:
                end = self._views[age][(hashed & _ALL_BITS) >> self._shift]
                if end >= age and self._bytes[4 * (end - age) : 4 * end] == run[-4 * age :]:
                    found[age] = end
        return found

    def after(self, end: int, count: int) -> list[int]:
        """Return the next tokens of the text from `end` on, at most `count`."""
        token_ids: list[int] = self._token_ids[end : end + count].tolist()
        return token_ids[: token_ids.index(_NO_TOKEN)] if _NO_TOKEN in token_ids else token_ids
