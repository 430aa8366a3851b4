"""The workloads that are made: exact lengths, the same for the same seed, and each what its name says."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise, takewhile
from math import sqrt
from random import Random

import numpy as np
import pytest
from scipy import stats

from shoal.loadtest.records import LoadTestError
from shoal.loadtest.workload import (
    AGENT_MAX_TOKENS,
    CHAT_KINDS,
    CHAT_MAX_TOKENS,
    CHAT_OUTPUT_MEDIAN,
    CHAT_OUTPUT_SIGMA,
    MIN_MODEL_LEN,
    WORKLOADS,
    Maker,
    WorkloadRequest,
    make_workload,
)
from shoal.model.text.tokenizer import Tokenizer
from tests.loadtest.conftest import MAX_MODEL_LEN, NUM_REQUESTS, Make


def num_shared(first: list[int], second: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def by_bytes(text: str) -> list[int]:
    """A tokenizer that is quick, and can make any number of tokens."""
    return list(text.encode())


@pytest.fixture(scope="module")
def many() -> list[WorkloadRequest]:
    """So much chat that its statistics are near those of the distribution."""
    return make_workload("chat", 4000, 3, by_bytes, MAX_MODEL_LEN)


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_fits_and_is_tokenized_as_it_stands(name: str, made: Make, tokenizer: Tokenizer) -> None:
    requests = made(name)
    assert len(requests) == len({request.request_id for request in requests}) == NUM_REQUESTS
    assert len({request.max_tokens for request in requests}) == 1, "max_tokens must tell nothing"
    for request in requests:
        assert tokenizer.encode(request.prompt) == request.prompt_token_ids
        assert 1 <= request.num_output_tokens <= request.max_tokens
        assert 1 <= len(request.prompt_token_ids) <= MAX_MODEL_LEN - request.max_tokens
        assert request.arrival_time is None


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_makes_the_same_and_another_seed_another(name: str) -> None:
    first, again, other = (make_workload(name, 12, seed, by_bytes, MAX_MODEL_LEN) for seed in (1, 1, 2))
    assert first == again
    assert [request.prompt for request in first] != [request.prompt for request in other]
    assert make_workload(name, 5, 1, by_bytes, MAX_MODEL_LEN) == first[:5], "more requests begin with the same ones"


@pytest.mark.parametrize(
    ("name", "max_model_len", "message"),
    [
        ("chatt", 1024, "unknown workload 'chatt'; there are chat, code, agent, uniform, mixed-priority, two-ten"),
        ("chat", 1023, "need a context of 1024 tokens; max_model_len is 1023"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, max_model_len: int, message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        make_workload(name, 1, 1, by_bytes, max_model_len)


def test_a_tokenizer_that_cannot_make_the_number_is_told_of() -> None:
    with pytest.raises(LoadTestError, match="exactly 128 tokens"):
        make_workload("uniform", 1, 1, lambda text: [0] * (2 * len(text) + 1), MAX_MODEL_LEN)


# -- chat ------------------------------------------------------------------------------------------------------------


def test_chat_is_log_normal_up_to_its_cut(many: list[WorkloadRequest]) -> None:
    """Against scipy's log-normal: lengths are rounded up, so that each step of the distribution is met exactly."""
    lengths = np.array([request.num_output_tokens for request in many])
    expected = stats.lognorm(CHAT_OUTPUT_SIGMA, scale=CHAT_OUTPUT_MEDIAN)
    for length in (5, 20, 45, 100, 300, 600):
        share, error = expected.cdf(length), 4 * sqrt(0.25 / len(many))
        assert abs(np.mean(lengths <= length) - share) < error, length
    assert lengths.max() == CHAT_MAX_TOKENS
    assert abs(np.mean(lengths == CHAT_MAX_TOKENS) - expected.sf(CHAT_MAX_TOKENS)) < 0.01
    assert 60 < lengths.mean() < 110


def test_the_prompts_of_chat_are_log_normal_too(many: list[WorkloadRequest]) -> None:
    lengths = [len(request.prompt_token_ids) for request in many]
    logarithms = np.log([length - 0.5 for length in lengths if 20 < length < 300])
    assert np.median(lengths) == pytest.approx(42, rel=0.1)
    assert np.mean(lengths) == pytest.approx(69.5, rel=0.1)
    assert 0.5 < np.std(logarithms) < 1.0


def test_client_and_kind_explain_half_of_the_logarithm_and_nothing_else_does(many: list[WorkloadRequest]) -> None:
    """Least squares on who asked and what for, by numpy."""
    clients = sorted({request.client for request in many})
    # Cut prompts may lack the end of their opening, which then is their kind's alone up to there.
    kinds = [
        next((k for k, text in enumerate(CHAT_KINDS) if request.prompt.startswith(text)), None) for request in many
    ]
    rows = [i for i, kind in enumerate(kinds) if kind is not None]
    features = np.zeros((len(rows), len(clients) + len(CHAT_KINDS)))
    for row, i in enumerate(rows):
        features[row, clients.index(many[i].client)] = 1
        features[row, len(clients) + (kinds[i] or 0)] = 1
    logarithms = np.log([many[i].num_output_tokens - 0.5 for i in rows])
    fitted = features @ np.linalg.lstsq(features, logarithms, rcond=None)[0]
    explained = 1 - np.var(logarithms - fitted) / np.var(logarithms)
    assert 0.4 < explained < 0.6
    prompts = np.log([len(many[i].prompt_token_ids) for i in rows])
    assert abs(np.corrcoef(prompts, logarithms)[0, 1]) < 0.1


# -- the others ------------------------------------------------------------------------------------------------------


def test_uniform_is_uniform(made: Make) -> None:
    lengths = {(len(request.prompt_token_ids), request.num_output_tokens) for request in made("uniform")}
    assert lengths == {(128, 128)}


def test_code_shares_long_prefixes_within_a_handful_of_files(made: Make) -> None:
    files = defaultdict(list)
    for request in made("code"):
        assert 300 <= len(request.prompt_token_ids) <= 700
        files[request.client].append(request.prompt_token_ids)
    assert len(files) == 6
    for prompts in files.values():
        for first, second in pairwise(prompts):
            # All but what a cut inside a word changed.
            assert num_shared(first, second) >= min(len(first), len(second)) - 8


def test_a_turn_of_an_agent_begins_with_the_whole_of_the_one_before(made: Make) -> None:
    sessions = defaultdict(list)
    for request in made("agent"):
        sessions[request.session].append(request)
    assert len(sessions) > 5
    assert max(map(len, sessions.values())) >= 5
    for turns in sessions.values():
        assert len({turn.client for turn in turns}) == 1
        for before, after in pairwise(turns):
            assert after.prompt.startswith(before.prompt)
            grown = len(after.prompt_token_ids) - len(before.prompt_token_ids)
            assert grown > before.num_output_tokens, "the recorded answer is as long as the answer was"
            assert num_shared(before.prompt_token_ids, after.prompt_token_ids) >= len(before.prompt_token_ids) - 4
        assert len(turns[-1].prompt_token_ids) <= MIN_MODEL_LEN - AGENT_MAX_TOKENS
    openings = [turns[0].prompt_token_ids for turns in sessions.values()]
    assert all(num_shared(openings[0], other) >= 90 for other in openings), "agents share their instructions"
    in_order = [request.session for request in made("agent")]
    assert in_order == sorted(in_order), "session by session"


def test_every_eighth_request_is_urgent_and_short(made: Make) -> None:
    urgent = [request for request in made("mixed-priority") if request.client == "urgent"]
    others = [request for request in made("mixed-priority") if request.client != "urgent"]
    assert len(urgent) == NUM_REQUESTS / 8
    assert {request.priority for request in urgent} == {0}
    assert {request.priority for request in others} == {10}
    assert max(request.num_output_tokens for request in urgent) < min(request.num_output_tokens for request in others)


def test_the_greedy_tenant_asks_for_much_more(made: Make) -> None:
    tokens: dict[str, int] = defaultdict(int)
    for request in made("two-tenants"):
        tokens[request.client] += len(request.prompt_token_ids) + request.num_output_tokens
    assert tokens.keys() == {"greedy", "modest"}
    assert tokens["greedy"] > 20 * tokens["modest"]


def test_the_maker_cuts_lengths_at_their_most() -> None:
    maker = Maker(Random(1), by_bytes)
    lengths = [maker.log_normal(1e300, 2.0, 77) for _ in range(10)] + [maker.log_normal(1e-300, 1.0, 77)]
    assert lengths == [77] * 10 + [1]
