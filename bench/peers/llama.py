"""Drives llama.cpp with one batch for all sequences.

The server that comes with the Python package runs one request at a time, so this does what llama.cpp's own server
does: all sequences in one context, their prompts first, then one token of each in every step.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np

NUM_SEQS = 32
NUM_CONTEXT = NUM_SEQS * 256
NUM_BATCH = 512


class Engine:
    """A context with room for NUM_SEQS sequences of 256 tokens."""

    def __init__(self, weights: str, precision: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(weights.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = NUM_CONTEXT, NUM_BATCH, NUM_SEQS
        params.n_threads = params.n_threads_batch = num_threads
        if precision == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(NUM_BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        entries = [
            (seq, at, token, at == len(prompt) - 1)
            for seq, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        tokens = [0] * len(prompts)
        for start in range(0, len(entries), NUM_BATCH):
            self._decode(entries[start : start + NUM_BATCH], tokens)
        for step in range(max_tokens - 1):
            self._decode([(seq, len(prompt) + step, tokens[seq], True) for seq, prompt in enumerate(prompts)], tokens)

    def _decode(self, entries: list[tuple[int, int, int, bool]], tokens: list[int]) -> None:
        """Compute entries (sequence, position, token, is_wanted); where wanted, note the sequence's next token."""
        batch: Any = self._batch
        batch.n_tokens = len(entries)
        for i, (seq, at, token, is_wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, at, is_wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        for i, (seq, _, _, is_wanted) in enumerate(entries):
            if is_wanted:
                logits = llama_cpp.llama_get_logits_ith(self._context, i)
                row = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
                tokens[seq] = int(row.argmax())
