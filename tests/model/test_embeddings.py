"""Prompts that become vectors, through scheduler, executor and each backend, against transformers' hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shoal.model.step.batch import SamplingBatch
from shoal.model.step.masks import Masks
from shoal.model.step.pooling import Pool
from shoal.scheduler.output import Pooling, RequestOutput, SamplingParams, SchedulerStats, SchedulingParams
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.request import Request
from tests.model.oracles import SHAPES, random_record
from tests.model.test_generation import BACKENDS, LIMITS, NATIVE, NATIVE_INT8, NUM_BLOCKS, make_requests, run

METHODS = ("last", "mean", "cls")
ALL_BACKENDS = ["torch", NATIVE, NATIVE_INT8]


def embedded(requests: Iterable[Request], method: Any, num_dimensions: int = 32) -> list[Request]:
    """Requests of the same prompts that ask for a vector."""
    params = SamplingParams(max_tokens=0, temperature=0.0, seed=0, pooling=Pooling(method, num_dimensions))
    return [Request(f"v{one.request_id}", one.token_ids, params, 0.0, speculates=False) for one in requests]


def vectors(news: Iterable[RequestOutput]) -> dict[str, bytes]:
    return {one.request_id: one.embedding for one in news if one.embedding is not None}


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize("shape", ["llama", "llama-wide-heads", "mixtral", "mixtral-odd-width"])
def test_vectors_are_those_of_transformers(shape: str, backend: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(shape.partition("-")[0], **SHAPES[shape])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for method in METHODS:
        requests = embedded(make_requests(BACKENDS[backend][-1], 0.0), method, model.config.hidden_size)
        _, news = run(folder, backend, requests, num_blocks=400)
        assert {one.finish_reason for one in news} == {"length"}
        for request in requests:
            with torch.no_grad():
                states = model.model(torch.tensor([request.token_ids])).last_hidden_state[0]
            pooled = {"last": states[-1], "mean": states.mean(dim=0), "cls": states[0]}[method]
            expected = torch.nn.functional.normalize(pooled, dim=0).numpy()
            found = np.frombuffer(vectors(news)[request.request_id], "<f4")
            np.testing.assert_allclose(found, expected, atol=2e-5)
            assert np.linalg.norm(found.astype(np.float64)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_vectors_do_not_depend_on_batch_chunks_cache_or_preemption(
    shape: str, backend: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """To the bit, beside requests that generate; and the texts of those do not depend on the vectors."""
    folder = tiny_checkpoint(shape)
    block_size = BACKENDS[backend][-1]

    def mixed() -> list[Request]:
        texts = make_requests(block_size, 1.0)
        asked = [embedded(texts, method) for method in METHODS]
        for index, requests in enumerate(asked):
            for request in requests:
                request.request_id += str(index)
        requests = [request for four in zip(texts, *asked, strict=True) for request in four]
        for index, request in enumerate(requests):
            request.scheduling = SchedulingParams(priority=-index)  # each takes blocks from those before it
        return requests

    def tokens(news: list[RequestOutput]) -> dict[str, list[object]]:
        found: dict[str, list[object]] = {}
        for one in news:
            found.setdefault(one.request_id, []).extend(zip(one.token_ids, one.logprobs or (), strict=True))
        return {request_id: some for request_id, some in found.items() if some}

    stats, together = run(folder, backend, mixed(), num_blocks=NUM_BLOCKS, policy="priority")
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    limit = LIMITS["max_model_len"] * block_size
    _, whole = run(folder, backend, mixed(), num_blocks=400, max_chunk_tokens=limit, max_num_batched_tokens=limit)
    alone = [one for request in mixed() for one in run(folder, backend, [request], num_blocks=400, max_num_seqs=1)[1]]
    assert vectors(together) == vectors(whole) == vectors(alone)
    assert len(vectors(alone)) == 27
    assert tokens(together) == tokens(whole) == tokens(alone)


def test_only_what_reads_the_last_token_alone_looks_for_prefixes(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    prompt = Request("one", list(range(3, 40)), SamplingParams(max_tokens=0, seed=0), 0.0)

    def hits(method: str) -> tuple[SchedulerStats, list[RequestOutput]]:
        first, second = embedded([prompt], method)[0], embedded([prompt], method)[0]
        second.request_id = "again"
        return run(folder, "torch", [first, second], num_blocks=400, max_num_seqs=1)

    for method, num_hits in (("last", 36), ("mean", 0), ("cls", 0)):
        stats, news = hits(method)
        assert stats.num_prefix_hits == num_hits, method
        assert len(set(vectors(news).values())) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_vectors_do_not_depend_on_the_policy(policy: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Padding rows included."""
    folder = tiny_checkpoint("llama")
    found = []
    for name in ("fcfs", policy):
        requests = [*make_requests(4, 0.0)[:4], *embedded(make_requests(4, 0.0), "mean")]
        _, news = run(folder, "torch", requests, num_blocks=NUM_BLOCKS, max_num_seqs=3, policy=name)
        found.append(vectors(news))
    assert found[0] == found[1]
    assert len(found[0]) == 9


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_states_are_the_same_however_tokens_are_chosen(
    backend: str, paged: Any, sampling_batch: Callable[..., SamplingBatch]
) -> None:
    """At once, under masks that are computed meanwhile, or from the logits, as verification by rejection does."""
    create, options, _ = BACKENDS[backend]
    made, pages = create(random_record(), num_blocks=8, block_size=16, **options), paged(8, 16)
    batch = pages.batch([("a", [1, 2, 3], 0), ("b", [4, 5], 0)], all_logits=False)
    masks = Masks(np.full((1, 3), 2**32 - 1, np.uint32), lambda: None)
    masked = replace(sampling_batch(2, mask=[-1, 0]), masks=masks)
    found = []
    for compute in (
        lambda: made.execute(batch, sampling_batch(2)),
        lambda: made.execute(batch, masked),
        lambda: made.forward(batch),
    ):
        batch.hidden = np.zeros((5, made.hidden_size), np.float32)
        compute()
        found.append(batch.hidden.tobytes())
    assert np.isfinite(batch.hidden).all() and batch.hidden.all()
    assert len(set(found)) == 1


STATES = np.random.default_rng(3).standard_normal((17, 8)).astype(np.float32)


@given(st.sampled_from(METHODS), st.lists(st.integers(1, 16)), st.integers(1, 8))
def test_a_pool_gives_the_same_bits_for_all_chunks(method: Any, cuts: list[int], num_dimensions: int) -> None:
    def pooled(bounds: list[int], *, fails: bool) -> bytes | None:
        pool = Pool(Pooling(method, num_dimensions), len(STATES))
        for start, end in pairwise(bounds):
            count = end - start
            states = STATES[end - pool.num_states(start, count) : end]
            for _ in range(1 + fails):  # whatever fails after a step has it computed again
                vector = pool.add(start, count, states)
            assert (vector is not None) == (end == len(STATES))
        return vector

    bounds = sorted({0, len(STATES), *cuts})
    found = pooled(bounds, fails=False)
    assert found == pooled([0, len(STATES)], fails=False) == pooled(bounds, fails=True)
    wide = {"last": STATES[-1], "mean": STATES.astype(np.float64).mean(axis=0), "cls": STATES[0]}[method]
    cut = wide[:num_dimensions].astype(np.float64)
    np.testing.assert_allclose(np.frombuffer(found or b"", "<f4"), cut / np.linalg.norm(cut), atol=1e-6)


def test_zeros_stay_zeros() -> None:
    assert Pool(Pooling("last", 4), 1).add(0, 1, np.zeros((1, 8), np.float32)) == bytes(16)
