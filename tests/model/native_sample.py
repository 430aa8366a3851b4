"""The native sampler alone, on logits that a test makes."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int32, c_void_p

from shoal.model.backends.native_sampling import SamplerArguments
from shoal.model.step.batch import Float32, SamplerOutput, SamplingBatch


def sample(library: ctypes.CDLL, logits: Float32, sampling: SamplingBatch, *, num_threads: int = 1) -> SamplerOutput:
    """Choose a token at each row of `logits` [num_logits, vocab_size], C-contiguous, with threads for this call only.

    A backend samples in the same call that computes the logits.
    """
    vocab_size = logits.shape[1]
    arguments = SamplerArguments(vocab_size)
    output = arguments.bind(sampling)
    address, how = c_void_p(logits.ctypes.data), (byref(arguments.sampling), byref(arguments.chosen))
    fault = library.shoal_sample(c_int32(num_threads), address, c_int32(vocab_size), *how)
    assert fault is None, fault.decode()
    return output
