"""Passes a `SamplingBatch` to the native sampler and returns its `SamplerOutput`: see model/native/sampler.h."""

from __future__ import annotations

from ctypes import Structure, c_int64, c_void_p

import numpy as np

from shoal.model.backends.native_library import address
from shoal.model.step.batch import BIAS, PENALTY, Records, SamplerOutput, SamplingBatch
from shoal.model.step.sampling import SAMPLING_ROW


class Sampling(Structure):
    """ShoalSampling."""

    _fields_ = [
        ("num_rows", c_int64),
        ("rows", c_void_p),
        ("num_later", c_int64),
        ("num_penalties", c_int64),
        ("penalties", c_void_p),
        ("num_biases", c_int64),
        ("biases", c_void_p),
        ("num_masks", c_int64),
        ("masks", c_void_p),
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

    Reading the address of an array takes microseconds, and a batch that only decodes has the same rows in every step.
    So the address of the last step's rows is kept.  Only positions may have changed in these rows.

    Attributes:
        sampling, chosen: to be passed by reference once `bind` has filled them.
    """

    def __init__(self, vocab_size: int) -> None:
        self.sampling = Sampling()
        self.chosen = Chosen()
        self._vocab_size = vocab_size
        self._rows: Records | None = None
        self._num_top = -1

    def bind(self, batch: SamplingBatch) -> SamplerOutput:
        """Refer to the arrays of the batch and of the returned output, which the native call fills."""
        sampling, rows = self.sampling, batch.rows
        if rows is not self._rows:
            sampling.num_rows, sampling.rows = len(rows), address(rows, SAMPLING_ROW)
            self._num_top = min(int(rows["num_logprobs"].max(initial=-1)), self._vocab_size)
            self._rows = rows
        sampling.num_penalties, sampling.num_biases = len(batch.penalties), len(batch.biases)
        if sampling.num_penalties:
            sampling.penalties = address(batch.penalties, PENALTY)
        if sampling.num_biases:
            sampling.biases = address(batch.biases, BIAS)
        sampling.num_masks = 0
        if batch.masks is not None:
            sampling.num_masks, sampling.masks = len(batch.masks.bits), address(batch.masks.bits, np.dtype(np.uint32))
        return self._output(len(rows))

    def _output(self, num_rows: int) -> SamplerOutput:
        """An output of the right shape; log-probabilities are 0 at rows that ask for none."""
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
