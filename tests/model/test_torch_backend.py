from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.step.batch import SamplingBatch
from shoal.model.step.sampling import sample_reference
from tests.model.oracles import SHAPES, random_steps, run_chunks, sequences
from tests.model.tiny import expected_logits


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_through_chunks_in_mixed_batches(
    shape: str, tiny_checkpoint: Callable[..., Path], paged: Any
) -> None:
    folder = tiny_checkpoint(shape.split("-", maxsplit=1)[0], **SHAPES[shape])
    backend = TorchBackend(load_checkpoint(folder), num_blocks=128, block_size=4)
    texts = sequences(1, 150, 9, 33)
    first, second, third = texts
    steps = [{first: 70}, {first: 1, second: 5}, {second: 1, first: 66, third: 30}]
    steps += [{third: 1, first: 1, second: 1}] * 2 + [{second: 1, third: 1}, {first: 11}]
    logits = run_chunks(backend, paged(128, 4), texts, steps)
    for name, tokens in texts.items():
        np.testing.assert_allclose(logits[name], expected_logits(folder, tokens), atol=1e-4, rtol=0)


def test_bfloat16_and_shards(tiny_model: Callable[..., Any], paged: Any, tmp_path: Path) -> None:
    """A bfloat16 checkpoint computed in float32 is exact; in bfloat16 it is as near as transformers is."""
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    record = load_checkpoint(tmp_path)
    texts = sequences(2, 60, 20)
    first, second = texts
    steps = [{first: 40, second: 19}, {first: 1, second: 1}, {first: 19}]
    exact = run_chunks(TorchBackend(record, num_blocks=64, block_size=4), paged(64, 4), texts, steps)
    coarse = run_chunks(TorchBackend(record, dtype="bfloat16", num_blocks=64, block_size=4), paged(64, 4), texts, steps)
    for name, tokens in texts.items():
        truth = expected_logits(tmp_path, tokens)
        np.testing.assert_allclose(exact[name], truth, atol=1e-4, rtol=0)
        theirs = np.abs(expected_logits(tmp_path, tokens, torch.bfloat16) - truth)
        ours = np.abs(coarse[name] - truth)
        assert 0 < ours.mean() < 2 * theirs.mean()


def test_long_and_short_contexts_in_one_batch(tiny_checkpoint: Callable[..., Path], paged: Any) -> None:
    """Contexts in several buckets, tiles of several heights, and decodes that straddle both."""
    folder = tiny_checkpoint("llama", max_position_embeddings=1024)
    backend = TorchBackend(load_checkpoint(folder), num_blocks=512, block_size=4)
    texts = sequences(3, 700, 3, 130, 257, 1)
    names = list(texts)
    steps = [{name: len(texts[name]) - 1 for name in names[:4]}, dict.fromkeys(names, 1)]
    logits = run_chunks(backend, paged(512, 4), texts, steps)
    for name, tokens in texts.items():
        np.testing.assert_allclose(logits[name], expected_logits(folder, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["llama-wide-heads", "llama-no-groups", "mixtral", "mixtral-odd-width"])
def test_a_row_keeps_its_bits_beside_others(shape: str, tiny_checkpoint: Callable[..., Path], paged: Any) -> None:
    """Alone and whole, or in any chunks beside any others on two threads: what makes a request's tokens its own."""
    folder = tiny_checkpoint(shape.split("-", maxsplit=1)[0], **SHAPES[shape])
    backend = TorchBackend(load_checkpoint(folder), num_blocks=512, block_size=4)
    texts = sequences(4, 450, 7, 90, 301)
    alone = {name: run_chunks(backend, paged(512, 4), {name: t}, [{name: len(t)}])[name] for name, t in texts.items()}
    torch.set_num_threads(2)
    together = run_chunks(backend, paged(512, 4), texts, random_steps(5, texts))
    for name in texts:
        np.testing.assert_array_equal(together[name], alone[name])


def test_small_limits_change_nothing(
    tiny_checkpoint: Callable[..., Path], paged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the work is cut into tiles and groups, the numbers stay."""
    backend = TorchBackend(load_checkpoint(tiny_checkpoint("mixtral")), num_blocks=128, block_size=4)
    texts = sequences(6, 150, 40, 40, 9)
    steps = [{name: len(tokens) - 1 for name, tokens in texts.items()}, dict.fromkeys(texts, 1)]
    expected = run_chunks(backend, paged(128, 4), texts, steps)
    monkeypatch.setattr("shoal.model.backends.torch_plan._MAX_ELEMENTS", {"cpu": 5_000})
    found = run_chunks(backend, paged(128, 4), texts, steps)
    for name in texts:
        np.testing.assert_array_equal(found[name], expected[name])


def test_nan_stays_in_its_sequence_and_leaves_with_it(
    tiny_checkpoint: Callable[..., Path], paged: Any, sampling_batch: Callable[..., SamplingBatch]
) -> None:
    record = load_checkpoint(tiny_checkpoint("mixtral"))
    embedding = np.array(record.embedding)
    embedding[95] = np.nan
    poisoned = replace(record, embedding=embedding)
    backend, pages = TorchBackend(poisoned, num_blocks=8, block_size=4), paged(8, 4)
    healthy = [3, 1, 4, 1, 5]
    expected = TorchBackend(record, num_blocks=8, block_size=4).forward(paged(8, 4).batch([("h", healthy, 0)]))
    batch = pages.batch([("bad", [7, 95, 9, 9, 9, 9], 0), ("good", healthy, 0)])
    assert backend.execute(batch, sampling_batch(11)).token_ids.tolist()[1:6] == [-1] * 5
    np.testing.assert_array_equal(backend.forward(batch)[6:], expected)
    pages.release("bad")
    for name in ("next", "and-next", "all-the-rest"):  # every block is used again
        np.testing.assert_array_equal(backend.forward(pages.batch([(name, healthy, 0)])), expected)


def test_execute_samples_from_the_wanted_rows_and_may_be_repeated(
    tiny_checkpoint: Callable[..., Path], paged: Any, sampling_batch: Callable[..., SamplingBatch]
) -> None:
    backend = TorchBackend(load_checkpoint(tiny_checkpoint("mixtral")), num_blocks=64, block_size=4)
    pages = paged(64, 4)
    assert backend.vocab_size == 96
    batch = pages.batch([("a", [5, 6, 7], 0), ("b", [8], 0)], all_logits=False)
    logits = backend.forward(batch)
    assert logits.shape == (2, 96) and logits.dtype == np.float32
    for _ in range(2):
        out = backend.execute(batch, sampling_batch(2))
        assert out.token_ids.dtype == np.int32
        np.testing.assert_array_equal(out.token_ids, logits.argmax(-1))
    drawn = sampling_batch(2, temperature=1.0, top_p=0.9, seed=[1, 2], position=[3, 1], num_logprobs=2)
    expected = sample_reference(logits, drawn)
    np.testing.assert_array_equal(backend.execute(batch, drawn).token_ids, expected.token_ids)


def test_a_step_that_wants_no_logits(
    tiny_checkpoint: Callable[..., Path], paged: Any, sampling_batch: Callable[..., SamplingBatch]
) -> None:
    backend = TorchBackend(load_checkpoint(tiny_checkpoint()), num_blocks=64, block_size=4)
    pages = paged(64, 4)
    prompt = [3, 1, 4, 1, 5, 9, 2]
    silent = replace(pages.batch([("a", prompt[:4], 0)]), logits_indices=np.empty(0, np.int32))
    assert backend.execute(silent, sampling_batch(0)).token_ids.shape == (0,)
    continued = backend.forward(pages.batch([("a", prompt[4:], 4)]))
    whole = backend.forward(pages.batch([("b", prompt, 0)]))
    np.testing.assert_array_equal(continued, whole[4:])


def test_tied_embeddings_are_held_once(tiny_checkpoint: Callable[..., Path]) -> None:
    tied = TorchBackend(load_checkpoint(tiny_checkpoint(tie_word_embeddings=True)), num_blocks=4, block_size=4)
    assert tied._head.weight is tied._embedding
