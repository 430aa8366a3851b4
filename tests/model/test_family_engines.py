"""Whole engines over models whose layers see windows and chunks: the same texts, to the bit, in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from shoal.model.architecture import LatentConfig
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.record import ModelRecord
from shoal.model.speculation.draft_model import DraftModelProposer
from shoal.model.speculation.length import FixedLength
from shoal.model.speculation.mtp import MTPProposer
from shoal.model.speculation.proposer import Proposer
from shoal.model.speculation.self_speculative import SelfSpeculativeProposer
from shoal.model.speculation.speculation import Speculation
from shoal.model.speculation.suffix import SuffixProposer
from shoal.model.step.batch import Backend
from shoal.model.step.executor import ModelExecutor
from shoal.model.step.rows import BatchRows
from shoal.server.engine.memory import scheduled_groups
from tests.fakes import Harness
from tests.model.oracles import random_prediction, random_record

BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS = 16, 256, 5
# Layers, and the number of cache groups that they make.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "windows": ({"num_layers": 3, "window": 24}, 1),
    "windows and all": ({"num_layers": 6, "window": [40, 40, 0]}, 3),
    "chunks and all": ({"num_layers": 4, "chunk": [48, 48, 48, 0]}, 4),
    "two windows and a chunk": ({"num_layers": 4, "window": [1, 37, 0, 0], "chunk": [0, 0, 32, 0]}, 4),
    "latents": ({"num_layers": 3, "num_heads": 3, "num_kv_heads": 3, "latent": LatentConfig(24, 8, 12, 20)}, 1),
    "an empty place": ({"num_layers": 15, "window": [0, 20], "hidden_size": 16, "intermediate_size": 16}, 2),
}

BACKENDS: dict[str, Callable[..., Backend]] = {"torch": TorchBackend, "native": partial(NativeBackend, num_threads=2)}

each_model = pytest.mark.parametrize("model", MODELS)
each_backend = pytest.mark.parametrize(
    "kind",
    [
        "torch",
        pytest.param(
            "native", marks=pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
        ),
    ],
)


@cache
def record_of(model: str) -> ModelRecord:
    return random_record(4, vocab_size=64, **MODELS[model][0])


def keeping_all(record: ModelRecord) -> ModelRecord:
    """The same model in one cache group, of which nothing is given back."""
    return replace(record, config=replace(record.config, keeps_all=True))


def asked() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of up to twelve blocks, of which some begin alike and some repeat themselves."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 64, 5 * BLOCK_SIZE + 3).tolist()
    requests = []
    for index in range(12):
        own = rng.integers(0, 64, int(rng.integers(1, 50))).tolist()
        prompt = (shared[: len(shared) if index % 2 else 0] + own) * (2 if index % 3 == 0 else 1)
        how = {"seed": index, "temperature": 0.2 * (index % 5), "num_logprobs": 2}
        how["max_tokens"] = min(5 + 6 * index, MAX_MODEL_LEN - len(prompt))
        if index == 5:
            how["num_prompt_logprobs"] = 1
        requests.append((prompt, how))
    return requests


def serve(
    kind: str,
    record: ModelRecord,
    *,
    num_blocks: int | None = None,
    speculate: Callable[[BatchRows, Backend, int], Speculation] | None = None,
    num_lookahead_tokens: int = 0,
    **limits: int,
) -> Harness:
    """Serve all requests, one joining every third step; without `num_blocks` the largest one just fits."""
    groups = scheduled_groups(record.config)
    given: dict[str, Any] = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_chunk_tokens": 20,
        "max_num_batched_tokens": 50,
    } | limits
    if num_blocks is None:
        num_blocks = sum(group.most_blocks(MAX_MODEL_LEN, BLOCK_SIZE, given["max_chunk_tokens"]) for group in groups)
    backend = BACKENDS[kind](record, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    executor = ModelExecutor(
        backend,
        max_num_seqs=given["max_num_seqs"],
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_groups=len(groups),
        speculate=(lambda rows: speculate(rows, backend, num_blocks)) if speculate else None,
    )
    harness = Harness(
        executor=executor,
        groups=groups,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        num_lookahead_tokens=num_lookahead_tokens,
        **given,
    )
    for index, (prompt, how) in enumerate(asked()):
        harness.add(f"r{index}", prompt, **how)
        for _ in range(3):
            harness.step()
    harness.drain()
    return harness


@cache
def truth(kind: str, model: str) -> Harness:
    """Each request alone, its prompt in one step, with all blocks kept and no prefix found."""
    limits: dict[str, Any] = {
        "max_num_seqs": 1,
        "max_chunk_tokens": MAX_MODEL_LEN,
        "max_num_batched_tokens": MAX_MODEL_LEN,
    }
    harness = serve(kind, keeping_all(record_of(model)), num_blocks=400, enable_prefix_caching=False, **limits)
    assert harness.scheduler.stats().num_preemptions == 0
    return harness


def assert_same(actual: Harness, expected: Harness) -> None:
    assert actual.token_ids == expected.token_ids
    assert actual.logprobs == expected.logprobs
    assert actual.prompt_logprobs == expected.prompt_logprobs


@each_backend
@each_model
def test_texts_and_logprobs_do_not_depend_on_company_chunks_prefixes_or_preemption(kind: str, model: str) -> None:
    record = record_of(model)
    assert len(record.config.cache_groups) == MODELS[model][1]
    tight = serve(kind, record)
    stats = tight.scheduler.stats()
    assert stats.num_preemptions > 0, "blocks were meant to be few"
    assert stats.num_prefix_hits > 0, "prompts were meant to begin alike"
    if model != "latents":
        assert tight.config.num_blocks < len(record.config.cache_groups) * MAX_MODEL_LEN // BLOCK_SIZE
    assert_same(tight, truth(kind, model))
    roomy = serve(kind, record, num_blocks=600, max_chunk_tokens=MAX_MODEL_LEN, max_num_batched_tokens=MAX_MODEL_LEN)
    assert roomy.scheduler.stats().num_preemptions == 0
    assert_same(roomy, truth(kind, model))


@each_backend
@each_model
@pytest.mark.parametrize("method", ["self", "suffix", "draft", "mtp"])
def test_speculation_is_invisible(kind: str, model: str, method: str) -> None:
    record = record_of(model)
    draft = keeping_all(replace(record, layers=record.layers[:2]))
    draft = replace(draft, config=replace(draft.config, layers=draft.config.layers[:2]))

    def speculate(rows: BatchRows, target: Backend, num_blocks: int) -> Speculation:
        proposer: Proposer = SuffixProposer(rows)
        if method == "self":
            proposer = SelfSpeculativeProposer(target, rows, num_layers=2, draws_apart=False)
        elif method == "draft":
            backend = BACKENDS[kind](draft, num_blocks=num_blocks, block_size=BLOCK_SIZE)
            proposer = DraftModelProposer(backend, rows, num_blocks=num_blocks, max_catch_up=40, draws_apart=False)
        elif method == "mtp":
            prediction = random_prediction(record, 4)
            backend = BACKENDS[kind](prediction.model, num_blocks=num_blocks, block_size=BLOCK_SIZE)
            proposer = MTPProposer(prediction, backend, rows, num_blocks=num_blocks, draws_apart=False)
        return Speculation(proposer, FixedLength(4), rows, needs_slots=method != "suffix", by_rejection=False)

    harness = serve(
        kind,
        keeping_all(record) if method in ("draft", "mtp") else record,
        speculate=speculate,
        num_lookahead_tokens=0 if method == "suffix" else 4,
    )
    stats = harness.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_draft_tokens > 0
    assert method == "suffix" or sum(stats.num_accepted_tokens_per_pos) > 0
    assert_same(harness, truth(kind, model))
