"""Hands `SamplingBatch`es to the native sampler and gives back `SamplerOutput`s: see model/native/sampler.h."""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_int32, c_int64, c_void_p
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import Float32, Int32, SamplerOutput, SamplingBatch

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_OF_ROWS = (*_FLOATS, "top_k", "seeds", "positions", "forced_token_ids", "num_logprobs")
_PENALTIES = ("penalty_rows", "penalty_token_ids", "penalty_counts")
_BIASES = ("bias_rows", "bias_token_ids", "bias")
_ARRAYS = (*_OF_ROWS, *_PENALTIES, *_BIASES)
_arrays_of = attrgetter(*_ARRAYS)


class Sampling(Structure):
    """ShoalSampling."""

    _fields_ = [
        ("num_rows", c_int64),
        *((name, c_void_p) for name in _OF_ROWS),
        ("num_penalties", c_int64),
        *((name, c_void_p) for name in _PENALTIES),
        ("num_biases", c_int64),
        *((name, c_void_p) for name in _BIASES),
    ]


class Chosen(Structure):
    """ShoalChosen."""

    _fields_ = [
        ("token_ids", c_void_p),
        ("num_top", c_int64),
        *((name, c_void_p) for name in ("logprobs", "ranks", "top_token_ids", "top_logprobs")),
    ]


class SamplerArguments:
    """The arguments of the native sampler, kept from step to step.

    An array takes a microsecond to tell its address, so one that was there in the last step, as most are while a batch
    only decodes, is neither asked nor checked again: it may not have changed in place.

    Attributes:
        sampling, chosen: to be passed by reference once `bind` has filled them.
    """

    def __init__(self, vocab_size: int) -> None:
        self.sampling = Sampling()
        self.chosen = Chosen()
        self._vocab_size = vocab_size
        self._arrays: tuple[NDArray[Any] | None, ...] = (None,) * len(_ARRAYS)
        self._num_top = -1

    def bind(self, batch: SamplingBatch) -> SamplerOutput:
        """Refer to the arrays of the batch, and to those of the output that is returned: the native call fills it."""
        arrays = _arrays_of(batch)
        for name, array, known in zip(_ARRAYS, arrays, self._arrays, strict=True):
            if array is not known:
                setattr(self.sampling, name, array.ctypes.data)
                self._take(name, array)
        self._arrays = arrays
        num_rows = len(batch.temperature)
        assert set(map(len, arrays[: len(_OF_ROWS)])) == {num_rows}, "arrays of unequal lengths"
        self.sampling.num_rows = num_rows
        self.sampling.num_penalties = len(batch.penalty_rows)
        self.sampling.num_biases = len(batch.bias_rows)
        for rows, token_ids, values in (arrays[-6:-3], arrays[-3:]):
            if len(rows):
                self._check_entries(rows, token_ids, values, num_rows)
        return self._output(num_rows)

    def _take(self, name: str, array: NDArray[Any]) -> None:
        if name == "num_logprobs":
            self._num_top = min(int(array.max(initial=-1)), self._vocab_size)
        elif name == "forced_token_ids":
            assert array.max(initial=-1) < self._vocab_size, "forced_token_ids beyond the vocabulary"

    def _check_entries(self, rows: Int32, token_ids: Int32, values: NDArray[Any], num_rows: int) -> None:
        """The native code trusts what it is given; an array that is wrong is a bug of ours, and ends here."""
        assert len(rows) == len(token_ids) == len(values), "arrays of unequal lengths"
        assert rows[0] >= 0, "entries of a row that is not there"
        assert rows[-1] < num_rows, "entries of a row that is not there"
        assert (rows[1:] >= rows[:-1]).all(), "entries whose rows do not ascend"
        assert token_ids.view(np.uint32).max() < self._vocab_size, "entries beyond the vocabulary"

    def _output(self, num_rows: int) -> SamplerOutput:
        """An output of the right shape; log-probabilities stay 0 at rows that ask for none."""
        chosen, num_top = self.chosen, self._num_top
        output = SamplerOutput(np.empty(num_rows, np.int32))
        chosen.token_ids = output.token_ids.ctypes.data
        chosen.num_top = num_top
        if num_top >= 0:
            output.logprobs = np.zeros(num_rows, np.float32)
            output.ranks = np.zeros(num_rows, np.int32)
            output.top_token_ids = np.zeros((num_rows, num_top), np.int32)
            output.top_logprobs = np.zeros((num_rows, num_top), np.float32)
            chosen.logprobs, chosen.ranks = output.logprobs.ctypes.data, output.ranks.ctypes.data
            chosen.top_token_ids = output.top_token_ids.ctypes.data
            chosen.top_logprobs = output.top_logprobs.ctypes.data
        return output


def sample(library: ctypes.CDLL, logits: Float32, sampling: SamplingBatch, *, num_threads: int = 1) -> SamplerOutput:
    """Choose a token at each row of `logits` [num_logits, vocab_size], C-contiguous, with threads for this call only.

    For tests and tools: a backend samples in the same call that computes the logits.
    """
    vocab_size = logits.shape[1]
    arguments = SamplerArguments(vocab_size)
    output = arguments.bind(sampling)
    library.shoal_sample(
        c_int32(num_threads),
        c_void_p(logits.ctypes.data),
        c_int32(vocab_size),
        byref(arguments.sampling),
        byref(arguments.chosen),
    )
    return output
