"""From a schedule to arrays and back, over a backend whose logits are a function of what it reads from its KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.model.step.batch import ForwardBatch
from shoal.model.step.executor import ModelExecutor
from shoal.scheduler.config import CacheGroup
from shoal.scheduler.output import (
    FinishReason,
    NewRequest,
    SamplingParams,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)
from tests.examples import examples
from tests.fake_backend import FakeBackend
from tests.fakes import ALL, Harness, InjectedError, params

NUM_BLOCKS, BLOCK_SIZE = 32, 4


def make_executor(
    num_blocks: int = NUM_BLOCKS, block_size: int = BLOCK_SIZE, groups: Sequence[CacheGroup] = ALL
) -> tuple[ModelExecutor, FakeBackend]:
    backend = FakeBackend(num_blocks, block_size, groups=groups)
    limits = {"max_num_seqs": 8, "max_model_len": 128, "block_size": block_size, "num_groups": len(groups)}
    return ModelExecutor(backend, **limits), backend


def share(
    request_id: str,
    start: int,
    count: int,
    blocks: list[int],
    new: NewRequest | None = None,
    *,
    samples: bool = True,
    spec_token_ids: list[int] | None = None,
    num_blocks: int = 0,
) -> ScheduledRequest:
    """The share of a request whose id says its row: "a" is in row 0, "b" in row 1, and so on."""
    row = "abcdefgh".index(request_id)
    return ScheduledRequest(
        request_id, row, start, count, blocks, num_blocks or len(blocks), samples, spec_token_ids or [], new
    )


def new(prompt: list[int], **others: object) -> NewRequest:
    return NewRequest(prompt, len(prompt), params(**others))  # type: ignore[arg-type]  # any field


def greedy(backend: FakeBackend, context: list[int]) -> int:
    """What a request without biases and penalties gets."""
    return int(backend.logits(context, 0).argmax())


def oracle(backend: FakeBackend, prompt: list[int], asked: SamplingParams) -> tuple[list[int], list[float]]:
    """The plain loop for one request, written out of OpenAI's and CTRL's formulas; tokens and log-probabilities."""
    context, logprobs = list(prompt), []
    while (num_output := len(context) - len(prompt)) < asked.max_tokens:
        logits = backend.logits(context, asked.seed)
        scores = logits.copy()
        for token_id in range(backend.vocab_size):
            scores[token_id] += asked.logit_bias.get(token_id, 0.0)
            if num_output < asked.min_tokens and token_id in asked.stop_token_ids:
                scores[token_id] = -np.inf
            if token_id in context:
                factor = asked.repetition_penalty
                scores[token_id] = scores[token_id] / factor if scores[token_id] > 0 else scores[token_id] * factor
            count = context[len(prompt) :].count(token_id)
            scores[token_id] -= asked.frequency_penalty * count + asked.presence_penalty * (count > 0)
        context.append(int(scores.argmax()))
        logprobs.append(float(logits[context[-1]] - np.log(np.exp(logits).sum())))
        if context[-1] in asked.stop_token_ids:
            break
    return context[len(prompt) :], logprobs


def prompt_oracle(backend: FakeBackend, prompt: list[int], asked: SamplingParams) -> list[float]:
    scores = [backend.logits(prompt[:end], asked.seed) for end in range(1, len(prompt))]
    return [
        float(logits[token_id] - np.log(np.exp(logits).sum()))
        for logits, token_id in zip(scores, prompt[1:], strict=True)
    ]


def test_the_arrays_of_a_mixed_step() -> None:
    """A prefill chunk, a decode and a verification of two drafted tokens, written out by hand."""
    executor, backend = make_executor()
    executor.execute(
        SchedulerOutput(
            [share("a", 0, 3, [5], new([1, 2, 3])), share("b", 0, 2, [7, 2], new([4, 5, 6, 7, 8]), samples=False)], []
        )
    )
    first = greedy(backend, [1, 2, 3])
    executor.execute(
        SchedulerOutput(
            [
                share("a", 3, 3, [9], spec_token_ids=[10, 11], num_blocks=2),
                share("b", 2, 2, [], samples=False, num_blocks=2),
                share("c", 0, 1, [0], new([9])),
            ],
            [],
        )
    )
    batch, sampling = backend.batches[-1], backend.samplings[-1]
    assert batch.token_ids.tolist() == [first, 10, 11, 6, 7, 9]
    assert batch.positions.tolist() == [3, 4, 5, 2, 3, 0]
    assert batch.slot_mapping.tolist() == [[23, 36, 37, 30, 31, 0]]
    assert batch.query_start_loc.tolist() == [0, 3, 5, 6]
    assert batch.context_lens.tolist() == [6, 4, 1]
    assert batch.block_tables[0].tolist() == [5, 9]
    assert batch.block_tables[1].tolist() == [7, 2]
    assert batch.block_tables[2, 0] == 0
    assert batch.logits_indices.tolist() == [0, 1, 2, 5]
    assert sampling.rows["position"].tolist() == [4, 5, 6, 1]


def test_the_arrays_of_a_step_with_two_cache_groups() -> None:
    """A prompt, and a request whose first block of the second group was given back before it joined."""
    executor, backend = make_executor(groups=[CacheGroup(), CacheGroup(window=1)])
    executor.execute(SchedulerOutput([share("a", 0, 5, [5, 9, 7, 2], new([1, 2, 3, 4, 5]))], []))
    executor.execute(
        SchedulerOutput(
            [share("a", 5, 1, [], num_blocks=4), share("b", 4, 1, [5, -1, 3, 4], new([1, 2, 3, 4, 6]))],
            [],
        )
    )
    first, second = backend.batches
    assert first.slot_mapping.tolist() == [[20, 21, 22, 23, 28], [36, 37, 38, 39, 8]]
    assert first.block_tables.tolist() == [[5, 9, 7, 2]]
    assert second.slot_mapping.tolist() == [[29, 12], [9, 16]]
    assert second.block_tables.tolist() == [[5, 9, 7, 2], [5, -1, 3, 4]]


def test_a_step_that_samples_nothing_needs_no_logits() -> None:
    executor, backend = make_executor()
    result = executor.execute(SchedulerOutput([share("a", 0, 2, [0], new([1, 2, 3]), samples=False)], []))
    assert result == StepResult([[]])
    assert backend.batches[-1].logits_indices.tolist() == []


def test_a_step_that_only_releases_does_not_reach_the_backend() -> None:
    executor, backend = make_executor()
    executor.execute(SchedulerOutput([share("a", 0, 1, [0], new([1], num_prompt_logprobs=1))], []))
    assert executor.rows.scored.keys() == {0}
    assert executor.execute(SchedulerOutput([], [0])) == StepResult([])
    assert not executor.rows.scored
    assert len(backend.batches) == 1


@pytest.mark.parametrize("num_right", range(4))
def test_drafted_tokens_are_accepted_up_to_the_first_mismatch(num_right: int) -> None:
    executor, backend = make_executor()
    truth = oracle(backend, [1, 2], params(6))[0]
    executor.execute(SchedulerOutput([share("a", 0, 2, [3, 1], new([1, 2], max_tokens=6))], []))
    drafted = [token if index < num_right else (token + 1) % 16 for index, token in enumerate(truth[1:4])]
    result = executor.execute(SchedulerOutput([share("a", 2, 4, [], spec_token_ids=drafted, num_blocks=2)], []))
    assert result.token_ids == [truth[1 : num_right + 2]]
    follow_up = share("a", 3 + num_right, 1, [], num_blocks=2)
    assert executor.execute(SchedulerOutput([follow_up], [])).token_ids == [[truth[num_right + 2]]]


def test_a_step_given_again_has_the_same_result() -> None:
    executor, backend = make_executor()
    first = SchedulerOutput([share("a", 0, 3, [5], new([1, 2, 3]))], [])
    assert executor.execute(first) == executor.execute(first)
    token_ids = oracle(backend, [1, 2, 3], params(4))[0]
    second = SchedulerOutput([share("a", 3, 3, [9], spec_token_ids=[token_ids[1], 0], num_blocks=2)], [])
    assert executor.execute(second) == executor.execute(second)
    assert executor.execute(second).token_ids[0][:2] == token_ids[1:3]


def test_logits_that_are_not_finite_fail_their_own_request_only() -> None:
    executor, backend = make_executor()
    backend.poison = lambda context: context[0] == 4
    result = executor.execute(
        SchedulerOutput([share("a", 0, 2, [0], new([1, 2])), share("b", 0, 1, [1], new([4], num_logprobs=0))], [])
    )
    assert result.errors.keys() == {"b"}
    assert result.logprobs == {}
    assert "not finite" in result.errors["b"][1]
    assert result.token_ids[0] == [greedy(backend, [1, 2])]


def test_log_probabilities_and_alternatives_of_each_request_as_many_as_it_asks() -> None:
    executor, backend = make_executor()
    shares = [
        share("a", 0, 3, [0], new([1, 2, 3], num_logprobs=2)),
        share("b", 0, 2, [1], new([4, 5], num_logprobs=0, num_prompt_logprobs=3)),
        share("c", 0, 2, [2], new([6, 7])),
    ]
    result = executor.execute(SchedulerOutput(shares, []))
    assert result.token_ids == [[greedy(backend, prompt)] for prompt in ([1, 2, 3], [4, 5], [6, 7])]
    assert result.logprobs.keys() == {"a", "b"}
    assert result.prompt_logprobs.keys() == {"b"}
    assert_entry(backend, result.logprobs["a"][0], [1, 2, 3], result.token_ids[0][0], 2)
    assert_entry(backend, result.logprobs["b"][0], [4, 5], result.token_ids[1][0], 0)
    assert_entry(backend, result.prompt_logprobs["b"][0], [4], 5, 3)


def test_tokens_that_a_request_names_stand_in_the_place_of_alternatives_but_not_in_its_prompt() -> None:
    executor, backend = make_executor()
    asked = new([1, 2, 3], num_logprobs=1, num_prompt_logprobs=2, logprob_token_ids=(9, 0, 4))
    result = executor.execute(SchedulerOutput([share("a", 0, 3, [0], asked), share("b", 0, 1, [1], new([5]))], []))
    (entry,) = result.logprobs["a"]
    logits = backend.logits([1, 2, 3], 0)
    logprobs = logits - np.log(np.exp(logits).sum())
    assert entry.top_token_ids == [9, 0, 4]
    assert entry.top_logprobs == pytest.approx(logprobs[[9, 0, 4]], abs=1e-6)
    assert entry.logprob == pytest.approx(logprobs[result.token_ids[0][0]], abs=1e-6)
    for place, scored in enumerate(result.prompt_logprobs["a"]):
        assert_entry(backend, scored, [1, 2, 3][: place + 1], place + 2, 2)


def assert_entry(backend: FakeBackend, entry: TokenLogprobs, context: list[int], token_id: int, count: int) -> None:
    logits = backend.logits(context, 0)
    logprobs = logits - np.log(np.exp(logits).sum())
    best = sorted(range(backend.vocab_size), key=lambda other: -logprobs[other])
    assert entry.logprob == pytest.approx(logprobs[token_id], abs=1e-6)
    assert entry.rank == best.index(token_id) + 1
    assert entry.top_token_ids == best[:count]
    assert entry.top_logprobs == pytest.approx(logprobs[best[:count]], abs=1e-6)


def test_a_prompt_is_scored_chunk_by_chunk() -> None:
    executor, backend = make_executor()
    prompt = [3, 1, 4, 1, 5]
    results = [
        executor.execute(
            SchedulerOutput([share("a", 0, 2, [0, 1], new(prompt, num_prompt_logprobs=1), samples=False)], [])
        ),
        executor.execute(SchedulerOutput([share("a", 2, 2, [], num_blocks=2, samples=False)], [])),
        executor.execute(SchedulerOutput([share("a", 4, 1, [], num_blocks=2)], [])),
    ]
    entries = [result.prompt_logprobs.get("a", []) for result in results]
    assert [len(some) for some in entries] == [2, 2, 0]
    for index, entry in enumerate(sum(entries[1:], entries[0])):
        assert_entry(backend, entry, prompt[: index + 1], prompt[index + 1], 1)
    assert results[2].logprobs == {}


def test_only_shares_of_the_prompt_are_scored() -> None:
    executor, backend = make_executor()
    executor.execute(SchedulerOutput([share("a", 0, 3, [0, 1], new([1, 2, 3], num_prompt_logprobs=0))], []))
    assert backend.batches[-1].logits_indices.tolist() == [0, 1, 2]
    result = executor.execute(SchedulerOutput([share("a", 3, 3, [], spec_token_ids=[4, 5], num_blocks=2)], []))
    assert backend.batches[-1].logits_indices.tolist() == [0, 1, 2]
    assert (backend.samplings[-1].rows["forced_token_id"] == -1).all()
    assert result.prompt_logprobs == {}
    executor.execute(SchedulerOutput([share("a", 4, 2, [], num_blocks=2)], []))
    assert backend.batches[-1].logits_indices.tolist() == [1]


@pytest.mark.parametrize(("output", "max_tokens"), [([7, 8], 4), ([], 0)])
def test_a_prompt_computed_together_with_its_output_has_its_own_scores_only(output: list[int], max_tokens: int) -> None:
    """After a preemption the output is computed again in the same share; without output, nothing may follow."""
    executor, backend = make_executor()
    asked = params(max_tokens, num_prompt_logprobs=1, num_logprobs=0)
    joining = NewRequest([1, 2, 3, *output], 3, asked)
    result = executor.execute(
        SchedulerOutput([share("a", 0, 3 + len(output), [0, 1], joining, samples=max_tokens > 0)], [])
    )
    first, second = result.prompt_logprobs["a"]
    assert_entry(backend, first, [1], 2, 1)
    assert_entry(backend, second, [1, 2], 3, 1)
    assert len(result.logprobs.get("a", [])) == len(result.token_ids[0]) == min(max_tokens, 1)


def test_a_failed_step_can_be_repeated_request_by_request() -> None:
    executor, backend = make_executor()

    def fail(batch: ForwardBatch) -> None:
        if (batch.token_ids[batch.positions == 0] == 13).any():
            raise InjectedError("thirteen")

    backend.fail = fail
    harness = Harness(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, executor=executor)
    harness.add("a", [1, 2, 3], 3)
    harness.add("b", [13], 3)
    harness.add("c", [4, 5], 3)
    harness.drain()
    assert harness.finish_reasons["b"] is FinishReason.ERROR
    for request_id, prompt in (("a", [1, 2, 3]), ("c", [4, 5])):
        truth = oracle(backend, prompt, params(3))[0]
        assert harness.token_ids[request_id] == truth


class Proposing:
    """A `ModelExecutor` that drafts the next tokens of each text; every fifth token is wrong."""

    def __init__(self, executor: ModelExecutor, texts: dict[str, list[int]]) -> None:
        self.executor = executor
        self.texts = texts

    def execute(self, output: SchedulerOutput) -> StepResult:
        result = self.executor.execute(output)
        if output.scheduled:
            result.spec_token_ids = [
                self._draft(share, len(tokens))
                for share, tokens in zip(output.scheduled, result.token_ids, strict=True)
            ]
        return result

    def _draft(self, share: ScheduledRequest, num_chosen: int) -> list[int]:
        if not num_chosen:
            return []
        known = share.num_computed_tokens + share.num_scheduled_tokens - len(share.spec_token_ids) + num_chosen
        rest = self.texts[share.request_id][known:]
        return [token_id if (known + index) % 5 else (token_id + 1) % 16 for index, token_id in enumerate(rest[:3])]


TOKENS = st.integers(0, 15)
SAMPLING = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(0, 8),
        "seed": st.integers(0, 2**64 - 1),
        "stop_token_ids": st.frozensets(TOKENS, max_size=2),
        "min_tokens": st.integers(0, 3),
        "num_logprobs": st.sampled_from([None, 0, 3]),
        "logprob_token_ids": st.sampled_from([None, None, (15, 0, 7, 3)]),
        "num_prompt_logprobs": st.sampled_from([None, None, 2]),
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-2.0, 1.5]), max_size=2),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.0, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.5]),
    }
)


@settings(max_examples=examples(120), derandomize=True)
@given(
    requests=st.lists(st.tuples(st.integers(0, 9), st.lists(TOKENS, min_size=1, max_size=8), SAMPLING), max_size=6),
    block_size=st.integers(1, 8),
    spare_blocks=st.integers(0, 6),
    groups=st.sampled_from([ALL, ALL, (CacheGroup(window=5),), (CacheGroup(window=3), *ALL, CacheGroup(chunk=6))]),
    max_chunk_tokens=st.sampled_from([1, 3, 100]),
    enable_prefix_caching=st.booleans(),
    speculates=st.booleans(),
)
def test_every_request_gets_what_it_gets_alone(
    *,
    requests: list[tuple[int, list[int], dict[str, object]]],
    block_size: int,
    spare_blocks: int,
    groups: Sequence[CacheGroup],
    max_chunk_tokens: int,
    enable_prefix_caching: bool,
    speculates: bool,
) -> None:
    # The longest request just fits: preempts all the time.
    num_blocks = sum(group.most_blocks(26, block_size, max_chunk_tokens) for group in groups) + spare_blocks
    model, backend = make_executor(num_blocks, block_size, groups)
    asked = {
        f"r{index}": ([7, 7, 1, 2, 3, 4, 5, 6, 0][:shared] + own, params(**others))  # type: ignore[arg-type]
        for index, (shared, own, others) in enumerate(requests)
    }
    truth = {request_id: oracle(backend, prompt, sampling) for request_id, (prompt, sampling) in asked.items()}
    texts = {request_id: asked[request_id][0] + tokens for request_id, (tokens, _) in truth.items()}
    harness = Harness(
        executor=Proposing(model, texts) if speculates else model,
        groups=groups,
        num_blocks=num_blocks,
        block_size=block_size,
        max_chunk_tokens=max_chunk_tokens,
        max_num_batched_tokens=20,
        enable_prefix_caching=enable_prefix_caching,
    )
    for request_id, (prompt, _) in asked.items():
        harness.add(request_id, prompt, **requests[int(request_id[1:])][2])  # type: ignore[arg-type]
    harness.drain()
    assert not model.rows.scored
    for request_id, (prompt, sampling) in asked.items():
        tokens, logprobs = truth[request_id]
        assert harness.token_ids[request_id] == tokens
        if sampling.num_logprobs is not None or sampling.logprob_token_ids:
            assert [entry.logprob for entry in harness.logprobs[request_id]] == pytest.approx(logprobs, abs=1e-5)
        if sampling.logprob_token_ids:
            named = [entry.top_token_ids for entry in harness.logprobs[request_id]]
            assert named == [list(sampling.logprob_token_ids)] * len(tokens)
        scored = prompt_oracle(backend, prompt, sampling) if sampling.num_prompt_logprobs is not None else []
        assert [entry.logprob for entry in harness.prompt_logprobs[request_id]] == pytest.approx(scored, abs=1e-5)
