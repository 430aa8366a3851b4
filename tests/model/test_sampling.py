"""The specification of sampling, against oracles that do not share its code."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from shoal.clients.types import SamplingOptions
from shoal.model.backends import native_library
from shoal.model.backends.native_library import load_library, supported_isas
from shoal.model.backends.torch_sampler import sample as torch_sample
from shoal.model.step import sampling
from shoal.model.step.batch import SamplerOutput, SamplingBatch
from shoal.model.step.masks import Masks
from shoal.model.step.noise import gumbel_noise
from shoal.model.step.sampling import SAMPLING_ROW, sample_reference
from shoal.scheduler.output import SamplingParams
from shoal.server.wire.requests import MAX_LOGPROBS, GenerationBody
from tests.model import native_sample

ROOT = Path(__file__).resolve().parent.parent.parent
Sampler = Callable[[np.ndarray, SamplingBatch], SamplerOutput]
Batches = Callable[..., SamplingBatch]


def torch_sampler(logits: np.ndarray, sampling: SamplingBatch) -> SamplerOutput:
    with torch.inference_mode():
        return torch_sample(torch.from_numpy(logits), sampling)


@pytest.fixture(params=["reference", "torch", *supported_isas()])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    by_name = {"reference": sample_reference, "torch": torch_sampler}
    return by_name.get(request.param) or partial(native_sample.sample, load_library(request.param))


def random_logits(seed: int, num_rows: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


def select(sampling: SamplingBatch, rows: np.ndarray) -> SamplingBatch:
    """The batch of the given rows, in that order."""

    def entries_of(entries: np.ndarray) -> np.ndarray:
        kept = [entries[entries["row"] == row] for row in rows]
        selected = np.concatenate(kept)
        selected["row"] = np.repeat(np.arange(len(rows)), [len(some) for some in kept])
        return selected

    return SamplingBatch(sampling.rows[rows], entries_of(sampling.penalties), entries_of(sampling.biases))


def mixed(sampling_batch: Batches, seed: int, num_rows: int, vocab_size: int) -> SamplingBatch:
    """Rows with all kinds of parameters at once."""
    rng = np.random.default_rng(seed)

    def some(neutral: float, values: list[float]) -> np.ndarray:
        return np.where(rng.random(num_rows) < 0.5, neutral, rng.choice(values, num_rows))

    num_entries = num_rows * 2
    pairs = np.sort(rng.choice(num_rows * vocab_size, num_entries, replace=False))
    biased = np.sort(rng.choice(num_rows * vocab_size, num_rows, replace=False))
    return sampling_batch(
        num_rows,
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.5], num_rows),
        top_k=some(0, [1, 2, 5, 40, vocab_size, vocab_size + 7]),
        top_p=some(1, [0.0, 0.1, 0.5, 0.9, 0.95, 0.999]),
        min_p=some(0, [0.01, 0.05, 0.3, 1.0]),
        top_n_sigma=some(0, [-1, 0.001, 0.5, 1.0, 2.0, 30.0]),
        typical_p=some(1, [0.0, 0.1, 0.2, 0.9, 0.95, 0.999]),
        xtc_probability=some(0, [0.3, 1.0]),
        xtc_threshold=rng.choice([0.0, 0.001, 0.05, 0.1, 0.3, 0.5, 0.51], num_rows),
        presence_penalty=some(0, [-1.0, 0.5, 2.0]),
        frequency_penalty=some(0, [-0.5, 0.1, 1.1]),
        repetition_penalty=some(1, [0.8, 1.1, 2.0]),
        seed=rng.integers(0, 2**64, num_rows, dtype=np.uint64),
        position=rng.integers(0, 100_000, num_rows),
        forced_token_id=some(-1, [-1, -1, -1, 3]),
        num_logprobs=some(-1, [0, 1, 5]),
        penalties=zip(*divmod(pairs, vocab_size), rng.integers(0, 4, num_entries), strict=True),
        biases=zip(*divmod(biased, vocab_size), rng.choice([-np.inf, -100.0, -1.0, 2.5, 100.0], num_rows), strict=True),
        named={row: rng.choice(vocab_size, 1 + row % 20, replace=False) for row in range(0, num_rows, 7)},
    )


# The parameters, each a field of one structure.


def test_every_field_of_a_row_is_a_parameter_that_is_specified_and_may_be_asked_for() -> None:
    names = set(SAMPLING_ROW.names or ()) - {"position", "forced_token_id", "mask"}
    assert names <= {field.name for field in fields(SamplingParams)}
    asked_for = names - {"num_logprobs"}  # `logprobs` and `top_logprobs` on the wire
    assert asked_for <= set(GenerationBody.__struct_fields__)
    assert asked_for <= set(SamplingOptions.__annotations__)
    specification = sampling.__doc__ or ""
    assert [name for name in asked_for if name not in specification] == []


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "top_n_sigma", "typical_p", "xtc_threshold"])
def test_a_parameter_is_spelt_where_the_specification_says(name: str) -> None:
    specification = sampling.__doc__ or ""
    rooms = ("scheduler", "model", "server", "clients", "loadtest", "bench")
    files = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    spelling = {path.relative_to(ROOT).as_posix() for path in files if name in path.read_text()}
    assert len(spelling) == 7
    assert [path for path in spelling if path != "model/step/sampling.py" and path not in specification] == []


@pytest.mark.parametrize("isa", supported_isas())
def test_a_library_with_other_rows_is_refused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = np.dtype([(name, SAMPLING_ROW[name]) for name in reversed(SAMPLING_ROW.names or ())], align=True)
    assert other.itemsize == SAMPLING_ROW.itemsize
    monkeypatch.setattr(native_library, "SAMPLING_ROW", other)
    with pytest.raises(OSError, match="was built from other sources"):
        native_library._load.__wrapped__(native_library.library_path(isa))


# The noise, from the text of the specification, in whole numbers.


def noise_by_the_book(seed: int, position: int, token_id: int) -> float:
    modulus = 2**64

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % modulus
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % modulus
        return z ^ (z >> 31)

    key = mix((seed + 0x9E3779B97F4A7C15 * (position + 1)) % modulus)
    h = mix((key + 0x9E3779B97F4A7C15 * (token_id + 1)) % modulus)
    return -math.log(-math.log(((h >> 12) + 0.5) * 2.0**-52))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEF])
@pytest.mark.parametrize("position", [0, 1, 4095, 2**31])
def test_noise_is_the_specified_hash(seed: int, position: int) -> None:
    noise = gumbel_noise(seed, position, 200)
    assert noise.dtype == np.float64
    np.testing.assert_allclose(noise, [noise_by_the_book(seed, position, t) for t in range(200)], rtol=1e-14)


def test_the_finalizer_is_that_of_splitmix64() -> None:
    """The generator's published first output for seed 0 is mix(gamma)."""
    assert gumbel_noise(0, 0, 1)[0] == noise_by_the_book(0, 0, 0)
    z = 0x9E3779B97F4A7C15
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    assert z ^ (z >> 31) == 0xE220A8397B1DCDAF


# The distribution, against the softmax of what transformers' warpers leave.


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0.8, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "typical_p": 0.6},
        {"temperature": 1.5, "top_k": 12, "typical_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_warped_softmax(params: dict[str, float], sampler: Sampler, sampling_batch: Batches) -> None:
    num_rows = 4000
    logits = random_logits(5, 1, 24, scale=1.5)
    batch = sampling_batch(num_rows, seed=np.arange(num_rows) % 100, position=np.arange(num_rows) // 100, **params)
    chosen = sampler(np.repeat(logits, num_rows, axis=0), batch).token_ids
    warped = TemperatureLogitsWarper(params["temperature"])(None, torch.from_numpy(logits))
    if "top_k" in params:
        warped = TopKLogitsWarper(int(params["top_k"]))(None, warped)
    if "typical_p" in params:
        warped = TypicalLogitsWarper(params["typical_p"])(None, warped)
    if "top_p" in params:
        warped = TopPLogitsWarper(params["top_p"])(None, warped)
    if "min_p" in params:
        warped = MinPLogitsWarper(params["min_p"])(None, warped)
    expected = warped.softmax(-1)[0].double().numpy()
    observed = np.bincount(chosen, minlength=24)
    possible = expected > 0
    assert not observed[~possible].any()
    assert chisquare(observed[possible], expected[possible] / expected.sum() * num_rows).pvalue > 1e-4


# The steps that transformers does not have, or has in another order, one by one as their papers have them.


def kept_by_the_book(logits: Sequence[float], how: Mapping[str, float], is_due: bool) -> dict[int, float]:
    """The probability of each token that may be chosen: plain loops, and nothing of the reference."""
    kept = {token: float(logit) for token, logit in enumerate(logits) if logit > -math.inf}
    if how["top_n_sigma"] > 0:
        least = max(kept.values()) - how["top_n_sigma"] * statistics.pstdev(kept.values())
        kept = {token: logit for token, logit in kept.items() if logit >= least}
    kept = {token: logit / how["temperature"] for token, logit in kept.items()}

    def shares() -> dict[int, float]:
        weights = {token: math.exp(x - max(kept.values())) for token, x in kept.items()}
        return {token: weight / math.fsum(weights.values()) for token, weight in weights.items()}

    def first_with(share: float, key: Callable[[int], float]) -> dict[int, float]:
        probability, before, found = shares(), 0.0, {}
        for token in sorted(kept, key=lambda token: (key(token), -kept[token], token)):
            if not found or before < share:
                found[token] = kept[token]
            before += probability[token]
        return found

    if how["top_k"]:
        kept = dict(sorted(kept.items(), key=lambda item: (-item[1], item[0]))[: int(how["top_k"])])
    if how["typical_p"] < 1:
        surprise = {token: -math.log(share) for token, share in shares().items()}
        entropy = math.fsum(share * surprise[token] for token, share in shares().items())
        kept = first_with(how["typical_p"], lambda token: abs(surprise[token] - entropy))
    if how["top_p"] < 1:
        kept = first_with(how["top_p"], lambda token: -kept[token])
    probability = shares()
    kept = {token: x for token, x in kept.items() if probability[token] >= how["min_p"] * max(probability.values())}
    if is_due and how["xtc_threshold"] <= 0.5:
        top = [token for token, share in shares().items() if share >= how["xtc_threshold"]]
        spared = min(top, key=lambda token: (kept[token], -token), default=None)
        kept = {token: x for token, x in kept.items() if token not in top or token == spared}
    return shares()


ways = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 1.7]),
        "top_n_sigma": st.just(0.0) | st.floats(-1, 4, width=32),
        "top_k": st.just(0) | st.integers(1, 30),
        "typical_p": st.just(1.0) | st.floats(0, 1, width=32),
        "top_p": st.just(1.0) | st.floats(0, 1, width=32),
        "min_p": st.just(0.0) | st.floats(0, 0.5, width=32),
        "xtc_probability": st.just(0.0) | st.floats(0, 1, width=32),
        "xtc_threshold": st.floats(0, 0.625, width=32),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ways, st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_what_may_be_chosen_is_what_the_papers_say(
    sampling_batch: Batches, how: dict[str, float], vocab_size: int, seed: int
) -> None:
    """And how probable it is, which is what speculation by rejection draws from."""
    logits = random_logits(seed % 2**32, 6, vocab_size)
    logits[np.random.default_rng(seed).random(logits.shape) < 0.1] = -np.inf
    logits[:, seed % vocab_size] = 1.0
    batch = sampling_batch(6, seed=seed, position=np.arange(6), **how)
    is_due = [chance_by_the_book(seed, position) < batch.rows["xtc_probability"][0] for position in range(6)]
    exact = {name: float(batch.rows[name][0]) for name in how}
    expected = np.zeros(logits.shape)
    for row in range(6):
        for token, share in kept_by_the_book(logits[row].tolist(), exact, is_due[row]).items():
            expected[row, token] = share
    np.testing.assert_allclose(sampling.probabilities(logits, batch), expected, rtol=1e-9)
    chosen = [sample(logits, batch).token_ids for sample in (sample_reference, torch_sampler)]
    noise = np.stack([gumbel_noise(seed, position, vocab_size) for position in range(6)])
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(chosen[0], (np.log(expected) + noise).argmax(axis=-1))
    np.testing.assert_array_equal(chosen[0], chosen[1])


def chance_by_the_book(seed: int, position: int) -> float:
    return math.exp(-math.exp(-noise_by_the_book(seed ^ 0x6A09E667F3BCC909, position, 0)))


def test_top_choices_are_left_out_as_often_as_asked(sampler: Sampler, sampling_batch: Batches) -> None:
    """Of three tokens that are probable enough the last one stays; when, depends on seed and position alone."""
    num_rows = 2000
    logits = np.tile(np.log(np.array([0.05, 0.4, 0.3, 0.2, 0.05], np.float32)), (num_rows, 1))
    where = {"seed": np.arange(num_rows) % 40, "position": np.arange(num_rows) // 40, "temperature": 1.0}
    chosen = sampler(logits, sampling_batch(num_rows, xtc_probability=0.3, xtc_threshold=0.15, **where)).token_ids
    plain = sampler(logits, sampling_batch(num_rows, **where)).token_ids
    changed = chosen != plain
    assert set(plain[changed].tolist()) <= {1, 2}
    assert (changed.sum() / (plain[:, None] == [1, 2]).sum()) == pytest.approx(0.3, abs=0.04)
    for off in ({"xtc_probability": 0.0}, {"xtc_probability": 1.0, "xtc_threshold": 0.51}):
        np.testing.assert_array_equal(sampler(logits, sampling_batch(num_rows, **off, **where)).token_ids, plain)


def test_sigma_does_not_depend_on_temperature(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = np.repeat(random_logits(12, 1, 400), 500, axis=0)
    stays = np.flatnonzero(logits[0] >= logits[0].max() - 0.5 * logits[0].astype(np.float64).std())
    for temperature in (1.0, 50.0):
        batch = sampling_batch(500, temperature=temperature, top_n_sigma=0.5, seed=np.arange(500))
        assert set(sampler(logits, batch).token_ids.tolist()) <= set(stays.tolist())
    assert 1 < len(set(sampler(logits, batch).token_ids.tolist())) == len(stays)


@cache
def rows_with_a_border_near_zero(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and top_n_sigma of 200 rows; between the logits at the border lie the last bits of a float64 near 9."""
    logits = -1 - abs(random_logits(vocab_size, 200, vocab_size))
    logits[:, :17] = 0
    top_n_sigma, border = np.zeros(200, np.float32), np.full(200, np.inf)
    for step in range(30):
        tried = logits.copy()
        tried[:, 0] = 9 + step * 2.0**-20
        sigma = tried.astype(np.float64).std(axis=1)
        n = (tried[:, 0] / sigma).astype(np.float32)
        found = tried[:, 0] - n * sigma
        nearer = abs(found) < abs(border)
        logits[nearer], top_n_sigma[nearer], border[nearer] = tried[nearer], n[nearer], found[nearer]
    for _ in range(30):  # what stands at the border moves it, less each time
        logits[:, 1:17] = border[:, None] + np.arange(-8, 8) * 2.0**-50
        border = logits[:, 0] - top_n_sigma * logits.astype(np.float64).std(axis=1)
    return logits, top_n_sigma


@pytest.mark.parametrize("vocab_size", [64, 1000, 4099])
def test_sigma_has_the_same_bits_everywhere(vocab_size: int, sampler: Sampler, sampling_batch: Batches) -> None:
    """Only the least token that sigma keeps may be chosen."""
    logits, top_n_sigma = rows_with_a_border_near_zero(vocab_size)
    batch = sampling_batch(200, temperature=1, top_n_sigma=top_n_sigma, xtc_probability=1, xtc_threshold=0)
    np.testing.assert_array_equal(sampler(logits, batch).token_ids, sample_reference(logits, batch).token_ids)


def test_greedy_stays_greedy(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = random_logits(13, 50, 300, scale=0.5)
    how = {"typical_p": 0.1, "top_n_sigma": 0.1, "xtc_probability": 1.0, "xtc_threshold": 0.0}
    np.testing.assert_array_equal(sampler(logits, sampling_batch(50, **how)).token_ids, logits.argmax(-1))


# Torch chooses as the reference does.


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(50, 2000), (300, 1500), (4096, 300)])
def test_torch_chooses_the_same_tokens(vocab_size: int, num_rows: int, sampling_batch: Batches) -> None:
    logits = random_logits(vocab_size, num_rows, vocab_size)
    logits[::3] = np.round(logits[::3])  # ties everywhere
    logits[::7] *= 1e-3  # nearly flat: top_p reaches far
    batch = mixed(sampling_batch, vocab_size, num_rows, vocab_size)
    expected, found = sample_reference(logits, batch), torch_sampler(logits, batch)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    asked = batch.rows["num_logprobs"] >= 0
    for name in ("ranks", "top_token_ids"):
        np.testing.assert_array_equal(getattr(found, name)[asked], getattr(expected, name)[asked])
    for name in ("logprobs", "top_logprobs"):
        np.testing.assert_allclose(getattr(found, name)[asked], getattr(expected, name)[asked], atol=1e-5)
    for field in fields(SamplerOutput):
        assert getattr(found, field.name).dtype == getattr(expected, field.name).dtype


def test_a_row_does_not_depend_on_the_others_nor_on_its_place(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = random_logits(3, 200, 120)
    logits[::4] = np.round(logits[::4])
    batch = mixed(sampling_batch, 11, 200, 120)
    together = sampler(logits, batch).token_ids
    rng = np.random.default_rng(0)
    for rows in (rng.permutation(200), np.arange(50, 83), *np.arange(0, 200, 11)[:, None]):
        np.testing.assert_array_equal(sampler(logits[rows], select(batch, rows)).token_ids, together[rows])


# Single steps, exactly.


def test_ties_go_to_the_lowest_id(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = np.zeros((1, 1000), np.float32)
    logits[0, [400, 700]] = 1.0
    assert sampler(logits, sampling_batch(1)).token_ids.tolist() == [400]
    flat = np.zeros((400, 1024), np.float32)
    seeds = np.arange(400)
    top_k = sampler(flat, sampling_batch(400, temperature=1, top_k=3, seed=seeds)).token_ids
    assert set(top_k.tolist()) == {0, 1, 2}
    top_p = sampler(flat, sampling_batch(400, temperature=1, top_p=4 / 1024, seed=seeds)).token_ids
    assert set(top_p.tolist()) == {0, 1, 2, 3}


def test_top_p_zero_and_min_p_one_keep_the_best_token(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = random_logits(8, 50, 300)
    for params in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}):
        batch = sampling_batch(50, temperature=2.0, seed=np.arange(50), **params)
        np.testing.assert_array_equal(sampler(logits, batch).token_ids, logits.argmax(-1))


def test_repetition_penalty_as_transformers(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = random_logits(2, 1, 40)
    seen = [3, 7, 21, 39]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), torch.from_numpy(logits.copy())).numpy()
    for forbidden in range(40):  # the whole order, by taking the best away one at a time
        order = np.argsort(-expected[0], kind="stable")
        banned = order[:forbidden]
        batch = sampling_batch(
            1,
            repetition_penalty=1.7,
            penalties=[(0, token_id, count) for token_id, count in zip(seen, [0, 1, 0, 5], strict=True)],
            biases=[(0, token_id, -np.inf) for token_id in banned],
        )
        assert sampler(logits, batch).token_ids[0] == order[forbidden]


def test_frequency_and_presence_penalties_are_those_of_the_openai_formula(
    sampler: Sampler, sampling_batch: Batches
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence; a token that only stands in the prompt has c = 0."""
    logits = np.array([[5.0, 4.9, 4.0, 3.0]], np.float32)

    def choose(counts: list[int], frequency: float, presence: float) -> int:
        batch = sampling_batch(
            1,
            frequency_penalty=frequency,
            presence_penalty=presence,
            penalties=[(0, token_id, count) for token_id, count in enumerate(counts)],
        )
        return int(sampler(logits, batch).token_ids[0])

    assert choose([0, 0, 0], 2.0, 2.0) == 0
    assert choose([1, 0, 0], 0.05, 0.0) == 0
    assert choose([3, 0, 0], 0.05, 0.0) == 1
    assert choose([1, 9, 0], 0.0, 0.5) == 0
    assert choose([1, 1, 0], 0.0, 1.5) == 2
    assert choose([9, 9, 9], 0.0, 2.5) == 3
    assert choose([0, 4, 4], -1.0, 0.0) == 1


def test_bias_moves_and_bans(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = np.array([[3.0, 2.0, 1.0]] * 3, np.float32)
    biases = [(0, 2, 5.0), (1, 0, 1.0), (1, 0, -np.inf), (2, 1, 0.5)]
    assert sampler(logits, sampling_batch(3, biases=biases)).token_ids.tolist() == [2, 1, 0]
    drawn = sampler(
        np.repeat(logits[:1], 500, axis=0),
        sampling_batch(
            500,
            temperature=5.0,
            seed=np.arange(500),
            biases=[(row, 0, -np.inf) for row in range(500)],
        ),
    )
    assert set(drawn.token_ids.tolist()) == {1, 2}


def test_logprobs_and_ranks_are_of_the_raw_logits(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = random_logits(4, 6, 50)
    batch = sampling_batch(
        6,
        temperature=[0, 1, 1, 0, 0, 1],
        top_k=2,
        num_logprobs=[0, 3, -1, 5, 1, 50],
        forced_token_id=[-1, -1, -1, 17, -1, -1],
        biases=[(0, 9, 100.0)],
    )
    out = sampler(logits, batch)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    assert out.token_ids[0] == 9 and out.token_ids[3] == 17
    assert out.logprobs is not None and out.ranks is not None
    assert out.top_token_ids is not None and out.top_logprobs is not None
    assert out.top_token_ids.shape == out.top_logprobs.shape == (6, 50)
    for row, count in enumerate(batch.rows["num_logprobs"]):
        if count < 0:
            continue
        token = out.token_ids[row]
        assert out.logprobs[row] == pytest.approx(expected[row, token], abs=1e-5)
        assert out.ranks[row] == sorted(expected[row], reverse=True).index(expected[row, token]) + 1
        order = np.argsort(-expected[row])[:count]
        assert out.top_token_ids[row, :count].tolist() == order.tolist()
        np.testing.assert_allclose(out.top_logprobs[row, :count], expected[row, order], atol=1e-5)


def test_named_tokens_have_their_logprobs_in_the_place_of_alternatives(
    sampler: Sampler, sampling_batch: Batches
) -> None:
    logits = random_logits(5, 6, 23)
    named = {0: [7, 3, 22], 1: [*range(20)], 4: [4], 5: [11, 0]}
    how: dict[str, Any] = {"temperature": [0, 1, 1, 0, 1, 1], "num_logprobs": [0, 0, -1, 23, 0, 0]}
    how |= {"forced_token_id": [-1, -1, -1, -1, 4, -1], "biases": [(0, 9, 100.0)]}
    plain, out = (sampler(logits, sampling_batch(6, **how, named=asked)) for asked in ({}, named))
    for name in ("token_ids", "logprobs", "ranks"):
        np.testing.assert_array_equal(getattr(out, name), getattr(plain, name))
    assert out.top_token_ids is not None and out.top_logprobs is not None
    assert plain.top_token_ids is not None and plain.top_logprobs is not None
    np.testing.assert_array_equal(out.top_token_ids[2:4], plain.top_token_ids[2:4])
    np.testing.assert_array_equal(out.top_logprobs[2:4], plain.top_logprobs[2:4])
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    for row, token_ids in named.items():
        assert out.top_token_ids[row, : len(token_ids)].tolist() == list(token_ids)
        np.testing.assert_allclose(out.top_logprobs[row, : len(token_ids)], expected[row, token_ids], atol=1e-5)


def test_as_many_tokens_may_be_named_as_a_request_may_name() -> None:
    assert SAMPLING_ROW["logprob_token_ids"].shape == (MAX_LOGPROBS,)


def test_no_logprobs_unless_asked(sampler: Sampler, sampling_batch: Batches) -> None:
    out = sampler(random_logits(0, 2, 9), sampling_batch(2))
    assert (out.logprobs, out.ranks, out.top_token_ids, out.top_logprobs) == (None, None, None, None)


def test_a_row_that_is_not_finite_has_no_token_and_changes_no_other_row(
    sampler: Sampler, sampling_batch: Batches
) -> None:
    logits = random_logits(6, 60, 40)
    batch = mixed(sampling_batch, 2, 60, 40)
    batch.biases["addend"] = 0.0
    healthy = sampler(logits, batch).token_ids
    broken = logits.copy()
    broken[::5, 3] = np.nan
    broken[1::5, 4] = np.inf
    broken[2::5] = -np.inf
    token_ids = sampler(broken, batch).token_ids
    for row in range(60):
        assert token_ids[row] == (-1 if row % 5 < 3 else healthy[row])


def test_a_mask_leaves_its_tokens_only(sampler: Sampler, sampling_batch: Batches) -> None:
    """At every temperature the tokens are those of a bias that bans the others; an empty mask has no answer."""
    logits = random_logits(8, 60, 70)
    allowed = np.random.default_rng(8).random((60, 70)) < 0.2
    allowed[:, 69] |= ~allowed.any(axis=1)
    bits = np.zeros((61, 12), np.uint8)
    bits[:60, :9] = np.packbits(allowed, axis=1, bitorder="little")
    how = {"temperature": [0.0, 0.7, 1.5] * 20, "top_k": [0, 3, 0, 60] * 15, "seed": range(60), "num_logprobs": 3}
    banned = sampling_batch(60, biases=[(*place, -np.inf) for place in np.argwhere(~allowed)], **how)
    masks = Masks(bits.view(np.uint32), wait=lambda: None)
    masked = replace(sampling_batch(60, mask=range(60), **how), masks=masks)
    expected, found = sampler(logits, banned), sampler(logits, masked)
    for field in fields(SamplerOutput):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
    masked.rows["mask"] = [60, -1] * 30
    token_ids = sampler(logits, masked).token_ids
    assert (token_ids[::2] == -1).all()
    np.testing.assert_array_equal(token_ids[1::2], sampler(logits, sampling_batch(60, **how)).token_ids[1::2])


def test_everything_banned_has_no_answer(sampler: Sampler, sampling_batch: Batches) -> None:
    biases = [(0, 0, -np.inf), (0, 1, -np.inf)]
    for temperature in (0.0, 1.0):
        batch = sampling_batch(2, temperature=temperature, top_p=0.9, biases=biases)
        out = sampler(np.zeros((2, 2), np.float32), batch)
        assert out.token_ids[0] == -1 and out.token_ids[1] in (0, 1)


def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow(sampler: Sampler, sampling_batch: Batches) -> None:
    logits = random_logits(9, 30, 100, scale=30)
    batch = sampling_batch(30, temperature=1e-38, top_p=0.9, seed=np.arange(30))
    np.testing.assert_array_equal(sampler(logits, batch).token_ids, logits.argmax(-1))
