"""Speculation in a whole engine: texts are those without it, for every proposer and under preemption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.speculation import rejection
from shoal.model.speculation.draft_model import DraftModelProposer
from shoal.model.speculation.drafting import Drafter
from shoal.model.speculation.length import AdaptiveLength, FixedLength, LengthRule
from shoal.model.speculation.mtp import MTPProposer
from shoal.model.speculation.proposer import Candidate, Proposal, Proposer
from shoal.model.speculation.self_speculative import SelfSpeculativeProposer
from shoal.model.speculation.speculation import Speculation
from shoal.model.speculation.suffix import SuffixProposer
from shoal.model.step.batch import Backend, SamplingBatch
from shoal.model.step.executor import ModelExecutor
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import probabilities
from shoal.scheduler.output import NewRequest, SamplingParams, ScheduledRequest
from tests.fakes import Harness
from tests.model.oracles import random_prediction, random_record

BLOCK_SIZE = 16
RECORD = random_record(3, num_layers=3, vocab_size=64)
# Similar to the target: some of the tokens that it drafts are accepted.
DRAFT = replace(RECORD, layers=RECORD.layers[:2], config=replace(RECORD.config, layers=RECORD.config.layers[:2]))
PREDICTION = random_prediction(RECORD, 4)
METHODS = ["draft", "mtp", "self", "suffix"]
needs_native = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
BACKENDS = ["torch", *(pytest.param(kind, marks=needs_native) for kind in ("native", "native-int8-cache"))]


def make_backend(kind: str, record: Any, num_blocks: int) -> Backend:
    if kind == "torch":
        return TorchBackend(record, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    kept: Any = "int8" if kind == "native-int8-cache" else "float32"
    return NativeBackend(record, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_threads=1, kv_cache_dtype=kept)


def make_speculation(
    rows: BatchRows,
    *,
    method: str,
    kind: str,
    target: Backend,
    num_blocks: int,
    lengths: LengthRule,
    by_rejection: bool = False,
) -> Speculation:
    proposer: Proposer
    if method == "draft":
        draft = make_backend(kind, DRAFT, num_blocks)
        proposer = DraftModelProposer(draft, rows, num_blocks=num_blocks, max_catch_up=40, draws_apart=by_rejection)
    elif method == "mtp":
        backend = make_backend(kind, PREDICTION.model, num_blocks)
        proposer = MTPProposer(PREDICTION, backend, rows, num_blocks=num_blocks, draws_apart=by_rejection)
    elif method == "self":
        proposer = SelfSpeculativeProposer(target, rows, num_layers=2, draws_apart=by_rejection)
    else:
        proposer = SuffixProposer(rows)
    return Speculation(proposer, lengths, rows, needs_slots=method != "suffix", by_rejection=by_rejection)


def run(
    method: str | None,
    lengths: LengthRule,
    *,
    kind: str = "native",
    num_blocks: int = 16,
    by_rejection: bool = False,
    requests: list[tuple[list[int], dict[str, Any]]],
) -> Harness:
    """Serve the requests, one joining every other step; every block is free at the end."""
    backend = make_backend(kind, RECORD, num_blocks)
    how = partial(
        make_speculation,
        method=method,
        kind=kind,
        target=backend,
        num_blocks=num_blocks,
        lengths=lengths,
        by_rejection=by_rejection,
    )
    executor = ModelExecutor(
        backend, max_num_seqs=8, max_model_len=128, block_size=BLOCK_SIZE, speculate=how if method else None
    )
    harness = Harness(
        executor=executor,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_model_len=128,
        max_num_batched_tokens=64,
        num_lookahead_tokens=8 if method else 0,
    )
    for index, (prompt, sampling) in enumerate(requests):
        speculates = sampling.get("speculates", True)
        request = harness.add(
            f"r{index}", prompt, **{name: sampling[name] for name in sampling if name != "speculates"}
        )
        request.speculates = speculates
        harness.step()
    harness.drain()
    return harness


def mixed_requests(count: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Every kind of parameter, and prompts that repeat themselves and each other."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 64, 36).tolist()
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "num_logprobs": 2},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "logprob_token_ids": (5, 63, 0)},
        {"temperature": 0.3, "min_p": 0.1, "logit_bias": {3: 2.0}, "min_tokens": 8, "stop_token_ids": frozenset({3})},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2},
        {"temperature": 0.2, "num_prompt_logprobs": 1, "num_logprobs": 0, "stop_token_ids": frozenset(range(0, 64, 9))},
    ]
    rarer = {"top_n_sigma": 2.0, "typical_p": 0.95, "xtc_probability": 0.5, "xtc_threshold": 0.05}
    requests = []
    for index in range(count):
        own = rng.integers(0, 64, int(rng.integers(1, 30))).tolist()
        prompt = (shared[: 36 if index % 3 else 0] + own) * (2 if index % 4 == 0 else 1)
        sampling = kinds[index % len(kinds)] | (rarer if index % 4 == 1 else {})
        sampling |= {"seed": index, "max_tokens": int(rng.integers(1, 30))}
        requests.append((prompt[:90], sampling))
    return requests


@cache
def truth(kind: str) -> Harness:
    return run(None, FixedLength(1), kind=kind, num_blocks=64, requests=mixed_requests(16))


def assert_same(actual: Harness, expected: Harness) -> None:
    assert actual.token_ids == expected.token_ids
    assert actual.finish_reasons == expected.finish_reasons
    for name in ("logprobs", "prompt_logprobs"):
        theirs = getattr(expected, name)
        assert getattr(actual, name).keys() == theirs.keys()
        for request_id, entries in getattr(actual, name).items():
            assert entries == theirs[request_id]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [3, 8, pytest.param(1, marks=pytest.mark.long)])
def test_texts_and_log_probabilities_are_those_without_it(method: str, kind: str, k: int) -> None:
    """With so few blocks that requests are often preempted."""
    harness = run(method, FixedLength(k), kind=kind, requests=mixed_requests(16))
    stats = harness.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_draft_tokens > sum(stats.num_accepted_tokens_per_pos) > 0
    assert_same(harness, truth(kind))


@pytest.mark.parametrize("method", METHODS)
def test_lengths_that_change_at_random_change_no_text(method: str) -> None:
    class Fickle(FixedLength):
        """A random length for each row in each step."""

        def __init__(self) -> None:
            super().__init__(1)
            self._rng = np.random.default_rng(4)

        def lengths(self, rows: list[int]) -> list[int]:
            return self._rng.integers(0, 9, len(rows)).tolist()

    assert_same(run(method, Fickle(), kind="torch", requests=mixed_requests(16)), truth("torch"))
    assert_same(run(method, AdaptiveLength(8), kind="torch", requests=mixed_requests(16)), truth("torch"))


def test_a_request_can_switch_speculation_off() -> None:
    requests = [([1, 2, 3, 1, 2, 3, 1, 2], {"max_tokens": 20, "seed": 1, "temperature": 0.0, "speculates": False})]
    harness = run("suffix", FixedLength(4), kind="torch", requests=requests)
    assert harness.scheduler.stats().num_drafts == 0


@pytest.mark.parametrize("method", METHODS)
def test_rejection_keeps_a_greedy_text_and_every_promise_about_ends(method: str) -> None:
    requests = [(prompt, sampling | {"temperature": 0.0}) for prompt, sampling in mixed_requests(12)]
    expected = run(None, FixedLength(1), kind="torch", num_blocks=64, requests=requests)
    actual = run(method, FixedLength(4), kind="torch", by_rejection=True, requests=requests)
    assert actual.token_ids == expected.token_ids
    assert actual.finish_reasons == expected.finish_reasons


@pytest.mark.parametrize("method", METHODS)
def test_rejection_draws_the_same_text_whenever_it_is_asked(method: str) -> None:
    requests = mixed_requests(12)
    one, other = (run(method, FixedLength(4), kind="torch", by_rejection=True, requests=requests) for _ in range(2))
    assert one.token_ids == other.token_ids


# -- the rule of rejection ---------------------------------------------------------------------------------------


def distribution(seed: int, size: int = 6) -> np.ndarray:
    weights = np.random.default_rng(seed).exponential(size=size)
    return weights / weights.sum()


@pytest.mark.parametrize("is_drawn", [True, False], ids=["a drawn token", "a certain token"])
def test_what_rejection_lets_through_has_the_targets_distribution(is_drawn: bool) -> None:
    """Three positions, over many seeds, whatever the first ones were."""
    target, draft = np.stack([distribution(i) for i in range(4)]), np.stack([distribution(i + 10) for i in range(3)])
    counts = np.zeros((4, 6))
    num_accepted = 0
    for seed in range(4000):
        rng = np.random.default_rng(seed)
        drafted = [int(rng.choice(6, p=row)) for row in draft] if is_drawn else [1, 2, 3]
        chosen = [int(rng.choice(6, p=row)) for row in target]
        proposal = Proposal(drafted, draft if is_drawn else None)
        tokens = rejection.verify(proposal, target, chosen, seed, position=10)
        num_accepted += len(tokens) - 1
        for place, token_id in enumerate(tokens):
            counts[place, token_id] += 1
    for place in range(4):
        assert counts[place].sum() > 100
        assert chisquare(counts[place], counts[place].sum() * target[place]).pvalue > 1e-3
    if is_drawn:  # the share that is accepted is what p and q have in common
        assert counts[1].sum() / 4000 == pytest.approx(np.minimum(target[0], draft[0]).sum(), abs=0.03)


def test_a_drafted_token_that_no_token_can_follow_ends_the_proposal() -> None:
    target = np.stack([distribution(0), np.zeros(6)])
    q = distribution(0)[None]
    assert rejection.verify(Proposal([2], q), target, [1, -1], seed=1, position=0) == [2, -1]
    assert rejection.verify(Proposal([2, 3], np.concatenate([q, q])), target, [1, -1, 4], seed=1, position=0) == [2, -1]


@pytest.mark.parametrize("how", [{"top_k": 6}, {"top_k": 6, "xtc_probability": 0.5, "xtc_threshold": 0.1}], ids=str)
def test_the_whole_engine_by_rejection_draws_from_the_targets_distribution(how: dict[str, Any]) -> None:
    """One prompt, many seeds: the second token, given the most frequent first one, against the model's own figures."""
    prompt = [5, 6, 7, 8, 5, 6]
    params: dict[str, Any] = {"max_tokens": 3, "temperature": 1.0, **how}
    requests = [(prompt, params | {"seed": seed}) for seed in range(200)]
    harness = run("draft", FixedLength(2), kind="torch", num_blocks=64, by_rejection=True, requests=requests)
    texts = list(harness.token_ids.values())
    first = max(range(64), key=[text[0] for text in texts].count)
    seeds = [seed for seed, text in enumerate(texts) if text[0] == first]
    seconds = [texts[seed][1] for seed in seeds]
    each = [next_distribution([*prompt, first], SamplingParams(**params, seed=seed)) for seed in seeds]
    expected = np.mean(each, axis=0)
    observed = np.bincount(seconds, minlength=64)
    kept = np.flatnonzero(expected)
    assert observed[expected == 0].sum() == 0
    assert chisquare(observed[kept], len(seconds) * expected[kept]).pvalue > 1e-3


def next_distribution(tokens: list[int], sampling: SamplingParams) -> np.ndarray:
    rows = BatchRows(1, 64, BLOCK_SIZE)
    backend = TorchBackend(RECORD, num_blocks=4, block_size=BLOCK_SIZE)
    new = NewRequest(tokens, len(tokens), sampling)
    row = rows.place(ScheduledRequest("a", 0, 0, len(tokens), [2], 1, True, [], new))
    drafter = Drafter(backend, rows, num_layers=None, draws_apart=True)
    drafted = drafter.draft([Candidate(row, len(tokens), 1)], {row: 0})[row].probabilities
    assert drafted is not None
    return drafted[0]


def test_probabilities_are_of_the_kept_tokens(sampling_batch: Callable[..., SamplingBatch]) -> None:
    logits = np.array([[0.0, 1.0, 2.0, 3.0]] * 4, np.float32)
    sampling = sampling_batch(4, temperature=[0.0, 1.0, 0.5, 1.0], top_k=[0, 2, 0, 0], biases=[(3, 3, -np.inf)])
    expected = np.zeros((4, 4))
    expected[0, 3] = 1
    expected[1, 2:] = np.exp([2, 3]) / np.exp([2, 3]).sum()
    expected[2] = np.exp([0, 2, 4, 6]) / np.exp([0, 2, 4, 6]).sum()
    expected[3, :3] = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    np.testing.assert_allclose(probabilities(logits, sampling), expected)
