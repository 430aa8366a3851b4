"""The native sampler against the specification's reference, on each instruction set; `test_sampling.py` has it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import byref, c_void_p
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from shoal.model.backends.native_library import load_library, supported_isas
from shoal.model.backends.native_sampling import SamplerArguments
from shoal.model.step.batch import BIAS, PENALTY, SamplerOutput, SamplingBatch
from shoal.model.step.masks import Masks
from shoal.model.step.sampling import sample_reference
from tests.examples import examples
from tests.model.native_sample import sample

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

Batches = Callable[..., SamplingBatch]

TEMPERATURES = [0.0, 1e-45, 1e-38, 1e-3, 0.1, 0.3, 0.8, 1.0, 1.5, 10.0]
# No dyadic share: at a tie that is exact in real numbers, the last bits of a sum would decide.
TOP_PS = [0.0, 1e-4, 0.1, 0.3, 0.7, 0.9, 0.95, 0.999]
LARGE = 49_152


# Logits of a row, made of normally distributed noise, the token ids, and whether each is a certain one.
Row = np.ndarray
HEALTHY: dict[str, Callable[[Row, Row, Row], Row]] = {
    "normal": lambda noise, ids, special: noise * 3,
    # few tokens have most of the probability, and a long tail the rest
    "realistic": lambda noise, ids, special: 8 - 1.6 * np.log(noise.argsort() + 1) + noise / 2,
    "flat": lambda noise, ids, special: noise / 1000 + 5,
    "ties": lambda noise, ids, special: np.round(noise * 2),
    "equal": lambda noise, ids, special: np.full_like(noise, noise[0]),
    "zeros": lambda noise, ids, special: noise * 0,  # +0 and -0 are equal
    "one-hot": lambda noise, ids, special: special * 20,
    "banned": lambda noise, ids, special: np.where((noise > 0.3) & ~special, -np.inf, noise),
    "huge": lambda noise, ids, special: noise * 1e30,
    "tiny": lambda noise, ids, special: noise * 1e-42,
    "periodic": lambda noise, ids, special: noise + (ids % 2) * 30,  # a sample with a stride sees one kind only
}
BROKEN: dict[str, Callable[[Row, Row, Row], Row]] = {
    "nan": lambda noise, ids, special: np.where(special, np.nan, noise),
    "-nan": lambda noise, ids, special: np.where(special, -np.nan, noise),
    "inf": lambda noise, ids, special: np.where(special, np.inf, noise),
    "all banned": lambda noise, ids, special: np.full_like(noise, -np.inf),
}


def random_logits(rng: np.random.Generator, kind: str, vocab_size: int) -> Row:
    noise, ids = rng.standard_normal(vocab_size), np.arange(vocab_size)
    return (HEALTHY | BROKEN)[kind](noise, ids, ids == rng.integers(vocab_size)).astype(np.float32)


def with_entries(batch: SamplingBatch, rng: np.random.Generator, vocab_size: int, per_row: int) -> SamplingBatch:
    """Penalties of `per_row` tokens in each row, of another number of biases, and none in some rows."""
    num_rows, per_penalised = len(batch.rows), min(per_row, vocab_size)
    penalised = np.flatnonzero(rng.random(num_rows) < 0.7)
    penalties = np.zeros(len(penalised) * per_penalised, PENALTY)
    penalties["row"] = np.repeat(penalised, per_penalised)
    penalties["token_id"] = [token_id for _ in penalised for token_id in rng.permutation(vocab_size)[:per_row]]
    penalties["count"] = rng.integers(0, 4, len(penalties))
    biases = np.zeros(per_row, BIAS)
    biases["row"] = np.sort(rng.integers(0, num_rows, per_row))
    biases["token_id"] = rng.integers(0, vocab_size, per_row)  # some more than once
    biases["addend"] = rng.choice([-np.inf, -100.0, -1.0, 2.5, 100.0], per_row)
    return replace(batch, penalties=penalties, biases=biases)


def with_masks(batch: SamplingBatch, rng: np.random.Generator, vocab_size: int) -> SamplingBatch:
    """Three masks, of few, of most and of any tokens, and bits beyond the vocabulary; some rows have one."""
    num_words = -(-vocab_size // 32)
    words = rng.integers(0, 2**32, (3, 3, num_words), dtype=np.uint32)
    bits = np.stack([words[0].min(axis=0), words[1].max(axis=0), words[2, 0]])
    bits[0, rng.integers(num_words)] |= np.uint32(1 << int(rng.integers(32)))
    rows = batch.rows.copy()
    rows["mask"] = rng.integers(-1, 3, len(rows))
    return replace(batch, rows=rows, masks=Masks(bits, wait=lambda: None))


def natives() -> Iterator[Callable[[np.ndarray, SamplingBatch], SamplerOutput]]:
    """The sampler on each instruction set, with one thread and with two."""
    for isa in supported_isas():
        for num_threads in (1, 2):
            yield lambda logits, batch, isa=isa, n=num_threads: sample(load_library(isa), logits, batch, num_threads=n)


def check(logits: np.ndarray, batch: SamplingBatch) -> None:
    """All samplers choose as the reference does and leave the logits alone, and all have the same bits."""
    with np.errstate(invalid="ignore"):  # a banned token whose logit is inf
        expected = sample_reference(logits, batch)
    asked = (batch.rows["num_logprobs"] >= 0) & (expected.token_ids >= 0)
    for top in (expected.top_token_ids, expected.top_logprobs):
        if top is not None:  # nothing stands behind the tokens that a row names
            named = batch.rows["logprob_token_ids"][:, :1] >= 0
            top[named & (np.arange(top.shape[1]) >= batch.rows["num_logprobs"][:, None])] = 0
    outputs = []
    for native in natives():
        passed = logits.copy()
        found = native(passed, batch)
        np.testing.assert_array_equal(passed.view(np.uint32), logits.view(np.uint32))
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        for field in fields(SamplerOutput):
            values, wanted = getattr(found, field.name), getattr(expected, field.name)
            if wanted is None:
                assert values is None
                continue
            assert (values.dtype, values.shape) == (wanted.dtype, wanted.shape)
            if field.name in ("ranks", "top_token_ids"):
                np.testing.assert_array_equal(values[asked], wanted[asked])
            elif field.name in ("logprobs", "top_logprobs"):
                scale = np.abs(logits[asked], where=np.isfinite(logits[asked]), out=np.zeros_like(logits[asked]))
                tolerance = max(1e-5, float(scale.max(initial=0)) * 1e-6)
                np.testing.assert_allclose(values[asked], wanted[asked], rtol=1e-6, atol=tolerance)
        outputs.append([getattr(found, field.name) for field in fields(SamplerOutput)])
    for output in outputs[1:]:
        for values, others in zip(output, outputs[0], strict=True):
            if values is not None:
                np.testing.assert_array_equal(values[asked], others[asked])


rows_of_options = st.lists(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from([*HEALTHY, *HEALTHY, *BROKEN]),
            "temperature": st.sampled_from(TEMPERATURES),
            "top_k": st.one_of(st.just(0), st.integers(1, 100), st.integers(1, 2100)),
            "top_p": st.one_of(st.just(1.0), st.sampled_from(TOP_PS)),
            "min_p": st.one_of(st.just(0.0), st.sampled_from([1e-6, 0.01, 0.05, 0.3, 1.0])),
            "top_n_sigma": st.one_of(st.just(0.0), st.sampled_from([-1.0, 1e-3, 0.7, 1.0, 2.0, 1e38])),
            "typical_p": st.one_of(st.just(1.0), st.sampled_from(TOP_PS)),
            "xtc_probability": st.one_of(st.just(0.0), st.sampled_from([0.5, 1.0])),
            "xtc_threshold": st.sampled_from([0.0, 1e-4, 0.03, 0.1, 0.4, 0.5, 0.51]),
            "presence_penalty": st.sampled_from([0.0, -1.0, 0.5, 2.0]),
            "frequency_penalty": st.sampled_from([0.0, -0.5, 0.1, 1.1]),
            "repetition_penalty": st.sampled_from([1.0, 0.8, 1.1, 2.0]),
            "seed": st.integers(0, 2**64 - 1),
            "forced": st.sampled_from([False, False, False, True]),
            "num_logprobs": st.sampled_from([-1, -1, 0, 1, 5, 60]),
            "num_named": st.sampled_from([0, 0, 0, 1, 4, 20]),
        }
    ),
    min_size=1,
    max_size=5,
)
vocab_sizes = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1023, 1024, 1025, 2000]))


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(vocab_sizes, rows_of_options, st.sampled_from([0, 0, 1, 3, 40]), st.integers(0, 2**32))
def test_chooses_as_the_reference(
    sampling_batch: Batches, vocab_size: int, options: list[dict[str, Any]], entries_per_row: int, seed: int
) -> None:
    """Each row's options at several positions."""
    rng = np.random.default_rng(seed)
    rows = [row for row in options for _ in range(6)]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    logits = np.stack([random_logits(rng, kind, vocab_size) for kind in columns.pop("kind")])
    forced = [rng.integers(vocab_size) if is_forced else -1 for is_forced in columns.pop("forced")]
    positions = rng.integers(0, 2**31, len(rows))
    named = {
        row: rng.choice(vocab_size, min(count, vocab_size), replace=False)
        for row, count in enumerate(columns.pop("num_named"))
        if count
    }
    batch = sampling_batch(len(rows), position=positions, forced_token_id=forced, named=named, **columns)
    batch = with_entries(batch, rng, vocab_size, entries_per_row)
    check(logits, batch)
    check(logits, with_masks(batch, rng, vocab_size))


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("realistic", "ties", "banned") else pytest.param(kind, marks=pytest.mark.long)
        for kind in HEALTHY
    ],
)
def test_a_large_vocabulary(kind: str, sampling_batch: Batches) -> None:
    """Every truncation alone and together with others, at several temperatures."""
    rng = np.random.default_rng(len(kind))
    options = [
        {},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 50},
        {"temperature": 1.0, "top_k": 10_000},
        {"temperature": 1.0, "top_k": 49_000},
        {"temperature": 1.0, "top_k": 30_000, "top_p": 0.3},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 2.0, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.01},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.3, "top_k": 2000, "top_p": 0.9, "min_p": 0.001},
        {"temperature": 1.0, "top_n_sigma": 1.0},
        {"temperature": 1.0, "typical_p": 0.2},
        {"temperature": 2.0, "typical_p": 0.95, "top_p": 0.9},
        {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.001},
        {"temperature": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.001, "top_k": 1000, "top_p": 0.9},
        {"temperature": 1.0, "top_n_sigma": 2.0, "typical_p": 0.9, "min_p": 0.01, "xtc_probability": 0.5},
    ]
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    neutral |= {"top_n_sigma": 0.0, "typical_p": 1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1}
    columns = {name: [row.get(name, value) for row in options] for name, value in neutral.items()}
    logits = np.stack([random_logits(rng, kind, LARGE) for _ in options])
    seeds = rng.integers(0, 2**64, len(options), dtype=np.uint64)
    batch = sampling_batch(len(options), seed=seeds, num_logprobs=[-1, 5] + [-1] * 15 + [20], **columns)
    check(logits, batch)
    check(logits, with_entries(batch, rng, LARGE, 500))
    check(logits, with_masks(batch, rng, LARGE))


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "periodic", "banned"])
def test_top_k_keeps_k_whatever_k(kind: str, sampling_batch: Batches) -> None:
    """At a temperature that makes all the same, the draws among the k are over all of them."""
    rng = np.random.default_rng(5)
    vocab_size = 3100
    top_k = [*range(1, 40), *rng.integers(1, vocab_size, 100), *range(vocab_size - 20, vocab_size + 3)]
    batch = sampling_batch(len(top_k), temperature=100.0, top_k=top_k, seed=np.arange(len(top_k)))
    check(np.stack([random_logits(rng, kind, vocab_size) for _ in top_k]), batch)


def test_top_p_counts_equal_tokens(sampling_batch: Batches) -> None:
    """Sums of ones are exact, and so is the border."""
    seeds = np.arange(300)
    logits = np.zeros((300, 1024), np.float32)
    for kept in (1, 4, 100, 1023):
        batch = sampling_batch(300, temperature=1.0, top_p=kept / 1024, seed=seeds)
        for native in natives():
            chosen = native(logits, batch).token_ids
            assert chosen.max() < kept
            np.testing.assert_array_equal(chosen, sample_reference(logits, batch).token_ids)


def test_equal_scores_go_to_the_lowest_id(sampling_batch: Batches) -> None:
    """At x = 1e40 the noise is lost in rounding."""
    logits = np.full((20, 300), 100.0, np.float32)
    logits[:, :7] = 99.0
    batch = sampling_batch(20, temperature=1e-38, seed=np.arange(20))
    for native in natives():
        assert native(logits, batch).token_ids.tolist() == [7] * 20


@pytest.mark.parametrize("temperature", TEMPERATURES[1:])
def test_equal_logits_at_any_temperature(temperature: float, sampling_batch: Batches) -> None:
    logits = np.random.default_rng(0).choice([0.0, -0.0, -1e-44], (40, 300)).astype(np.float32)
    check(logits, sampling_batch(40, temperature=temperature, seed=np.arange(40)))


def test_min_p_cuts_between_neighbours(sampling_batch: Batches) -> None:
    """Logits that are adjacent numbers, around the border."""
    logits = np.full((500, 65), 5.0, np.float32)
    border = np.float32(5 + 100 * np.log(0.3)).view(np.int32)
    logits[:, 1:] = np.arange(border - 32, border + 32, dtype=np.int32).view(np.float32)
    check(logits, sampling_batch(500, temperature=100.0, min_p=0.3, seed=np.arange(500)))


def test_penalties_round_as_specified(sampling_batch: Batches) -> None:
    """A penalised token against one whose logit is what the other's should become: equal, so the lower id is chosen."""
    rng = np.random.default_rng(3)
    num_rows = 1000
    logits = (rng.standard_normal((num_rows, 2)) * 5).astype(np.float32)
    repetition, frequency, presence = rng.uniform(0.5, 2, (3, num_rows)).astype(np.float32)
    counts = rng.integers(1, 50, num_rows)
    rows, penalised = np.arange(num_rows), rng.integers(0, 2, num_rows)
    values = logits[rows, penalised]
    values = np.where(values > 0, values / repetition, values * repetition)
    logits[rows, 1 - penalised] = (values - frequency * counts.astype(np.float32)) - presence
    batch = sampling_batch(
        num_rows,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        penalties=zip(rows, penalised, counts, strict=True),
    )
    for native in natives():
        assert not native(logits, batch).token_ids.any()


def test_logprobs_are_those_of_scipy(sampling_batch: Batches) -> None:
    rng = np.random.default_rng(1)
    kinds = ["normal", "realistic", "flat", "one-hot", "banned"]
    logits = np.stack([random_logits(rng, kind, LARGE) for kind in kinds])
    forced = rng.integers(0, LARGE, len(kinds))
    expected = log_softmax(logits.astype(np.float64), axis=-1)
    for native in natives():
        found = native(logits, sampling_batch(len(kinds), forced_token_id=forced, num_logprobs=20))
        assert found.logprobs is not None and found.top_logprobs is not None
        np.testing.assert_allclose(found.logprobs, expected[np.arange(len(kinds)), forced], atol=1e-5)
        np.testing.assert_allclose(found.top_logprobs, -np.sort(-expected)[:, :20], atol=1e-5)


def test_rows_that_ask_for_none_have_no_logprobs(sampling_batch: Batches) -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    logits[2] = np.nan
    for native in natives():
        found = native(logits, sampling_batch(3, num_logprobs=[4, -1, 4]))
        for values in (found.logprobs, found.ranks, found.top_token_ids, found.top_logprobs):
            assert values is not None and values[0].any() and not values[1:].any()


def test_arguments_serve_one_batch_after_the_other(sampling_batch: Batches) -> None:
    """Arrays that stay and arrays that are replaced, rows and entries that come and go."""
    rng = np.random.default_rng(2)
    library, vocab_size = load_library(), 300
    arguments = SamplerArguments(vocab_size)
    kept: dict[str, Any] = {}
    for step in range(60):
        if step % 7 == 0:
            num_rows = int(rng.integers(1, 20))
            kept = {"temperature": 1.0, "top_k": rng.integers(0, 9, num_rows), "top_p": rng.random(num_rows)}
            kept["num_logprobs"] = rng.integers(-1, 3, num_rows)
            batch = sampling_batch(num_rows, **kept)
        batch.rows["position"] = step
        if step % 3 == 0:
            batch = with_entries(batch, rng, vocab_size, step % 9)
        logits = rng.standard_normal((num_rows, vocab_size)).astype(np.float32)
        found = arguments.bind(batch)
        pointers = c_void_p(logits.ctypes.data), vocab_size, byref(arguments.sampling), byref(arguments.chosen)
        assert library.shoal_sample(1, *pointers) is None
        expected = sample_reference(logits, batch)
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"forced_token_id": [-1, -1, 40]}, "forced_token_id beyond the vocabulary"),
        ({"named": {2: [39, 40]}}, "logprob_token_ids beyond the vocabulary"),
        ({"named": {0: [0, -2]}}, "logprob_token_ids beyond the vocabulary"),
        ({"penalties": [(0, 40, 1)]}, "entries beyond the vocabulary"),
        ({"penalties": [(0, -1, 1)]}, "entries beyond the vocabulary"),
        ({"biases": [(3, 0, 1.0)]}, "entries of a row that is not there"),
        ({"biases": [(-1, 0, 1.0)]}, "entries of a row that is not there"),
        ({"biases": [(1, 0, 1.0), (0, 0, 1.0)]}, "entries whose rows do not ascend"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_before_a_token_is_chosen(
    wrong: dict[str, Any], message: str, sampling_batch: Batches
) -> None:
    for native in natives():
        with pytest.raises(AssertionError, match=message):
            native(np.zeros((3, 40), np.float32), sampling_batch(3, **wrong))


def test_records_of_another_kind_are_refused(sampling_batch: Batches) -> None:
    batch = sampling_batch(4, biases=[(0, 0, 1.0)])
    for wrong, message in (
        ({"rows": batch.rows[::2]}, "an array with gaps"),
        ({"rows": batch.rows[["position", "seed"]]}, "an array of another type"),
        ({"penalties": batch.biases}, "an array of another type"),
        ({"biases": np.zeros(4, BIAS)[::2]}, "an array with gaps"),
    ):
        with pytest.raises(AssertionError, match=message):
            SamplerArguments(vocab_size=40).bind(replace(batch, **wrong))
