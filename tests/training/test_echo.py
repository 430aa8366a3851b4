"""The text that a target writes for its draft is what it chooses, token by token."""

from __future__ import annotations

import numpy as np

from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.step.noise import gumbel_noise
from shoal.model.training import echo
from tests.model.batches import Paged
from tests.model.oracles import random_record


def test_a_text_is_a_documents_beginning_and_what_the_target_chooses_behind_it() -> None:
    record = random_record(1, vocab_size=64)
    rng = np.random.default_rng(0)
    documents = np.concatenate([np.r_[0, rng.integers(1, 64, 40)] for _ in range(9)]).astype(np.uint16)
    seen: list[int] = []
    echoes = echo.write_echoes(
        lambda num_blocks: TorchBackend(record, num_blocks=num_blocks, block_size=echo.BLOCK_SIZE),
        documents,
        200,
        num_rows=4,
        length=32,
        end_of_text=0,
        observe=seen.append,
    )
    assert seen == [128, 200]
    texts = echoes.reshape(-1, 32)
    assert len(texts) == 8
    starts = np.flatnonzero(documents == 0)
    backend = TorchBackend(record, num_blocks=8, block_size=16)
    for number, text in enumerate(texts.tolist()):
        row, given = number % 4, (1, 2)[number // 4]
        assert text[:given] in [documents[start : start + given].tolist() for start in starts]
        logits = backend.forward(Paged(8, 16).batch([("a", text, 0)]))
        temperature = (0.0, 0.8, 0.8, 1.0)[row]
        for place in range(given, 32):
            x = logits[place - 1].astype(np.float64)
            if temperature:
                x = x / np.float64(np.float32(temperature)) + gumbel_noise(number // 4 * 4 + row, place, 64)
            assert text[place] == x.argmax()
