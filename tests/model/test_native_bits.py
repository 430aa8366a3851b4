"""The native backend's promise: the bits of a sequence's logits depend only on the model and the sequence.

Each test compares them with those of the same sequence, prefilled whole and alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import has_bfloat16, supported_isas
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelRecord
from tests.examples import examples
from tests.model.oracles import BUNDLED, SMOLLM2, random_record, random_steps, run_chunks, run_whole, sequences

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

POOL = {"num_blocks": 400, "block_size": 16}
# Attention::kStretch in attention.h: the number of positions after which the sums of attention start again.
STRETCH = 256

# No size in the last one is a multiple of a vector's lanes, and more heads share a KV head than rows make a tile.
MODELS: dict[str, Callable[[], ModelRecord]] = {
    "bundled": lambda: load_checkpoint(BUNDLED),
    "smollm2": lambda: random_record(**SMOLLM2, vocab_size=500),
    "odd": lambda: random_record(
        **{"hidden_size": 37, "intermediate_size": 23, "vocab_size": 101, "tie_word_embeddings": False},
        **{"num_heads": 54, "num_kv_heads": 2, "head_dim": 6, "num_experts": 5, "num_experts_per_tok": 3},
    ),
}
NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16-cache": {"kv_cache_dtype": "float16"},
    "int8-cache": {"kv_cache_dtype": "int8"},
    "bfloat16": {"dtype": "bfloat16", "kv_cache_dtype": "float16"},
    "int8": {"quantization": "int8", "kv_cache_dtype": "float16"},
    "int4": {"quantization": "int4", "kv_cache_dtype": "float16"},
}
if supported_isas()[:1] == ("avx512",) and not has_bfloat16():
    del NUMBERS["bfloat16"]

LONG = pytest.mark.long
# Each model and each way to keep numbers; the small model with all of them.
SOME = [
    ("bundled", "float32"),
    ("bundled", "int8"),
    ("smollm2", "float16-cache"),
    ("smollm2", "int8-cache"),
    *product(["odd"], NUMBERS),
]
each_case = pytest.mark.parametrize(
    ("model", "numbers"),
    [case if case in SOME else pytest.param(*case, marks=LONG) for case in product(MODELS, NUMBERS)],
)


@cache
def record_of(model: str) -> ModelRecord:
    return MODELS[model]()


@cache
def backend_of(model: str, numbers: str, *, num_threads: int = 2, isa: str | None = None) -> NativeBackend:
    """Make a backend that the tests share: what earlier tests left in the KV cache must not matter either."""
    return NativeBackend(record_of(model), **POOL, **NUMBERS[numbers], num_threads=num_threads, isa=isa)


@pytest.fixture
def pages(paged: Any) -> Any:
    return paged(**POOL)


def all_alone(backend: NativeBackend, pages: Any, texts: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Compute the logits of each sequence whole and alone: the expected ones."""
    return {name: run_whole(backend, pages, text) for name, text in texts.items()}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, logits in expected.items():
        np.testing.assert_array_equal(found[name], logits)


@each_case
@pytest.mark.parametrize("chunk", [1, 64, pytest.param(7, marks=LONG)])
def test_prefilled_in_chunks(model: str, numbers: str, chunk: int, pages: Any) -> None:
    backend = backend_of(model, numbers)
    texts = sequences(1, 290)
    (name,) = texts
    chunks = [{name: min(chunk, 290 - start)} for start in range(0, 290, chunk)]
    expected = all_alone(backend, pages, texts)
    assert_same_bits(run_chunks(backend, pages, texts, chunks), expected)


@each_case
@pytest.mark.parametrize("num_others", [2, 31, *(pytest.param(n, marks=LONG) for n in (1, 5, 11))])
def test_prefilled_beside_others(model: str, numbers: str, num_others: int, pages: Any) -> None:
    """With logits of the last tokens alone, too."""
    backend = backend_of(model, numbers)
    rng = np.random.default_rng(num_others)
    texts = sequences(2, 70, *rng.integers(1, 40, num_others).tolist())
    expected = all_alone(backend, pages, texts)
    order = rng.permutation(list(texts)).tolist()
    assert_same_bits(run_chunks(backend, pages, texts, [{name: len(texts[name]) for name in order}]), expected)
    last = backend.forward(pages.batch([(name, texts[name], 0) for name in order], all_logits=False))
    np.testing.assert_array_equal(last, [expected[name][-1] for name in order])


@each_case
def test_decoded_in_batches_of_1_to_32_at_every_row(model: str, numbers: str, pages: Any) -> None:
    backend = backend_of(model, numbers)
    rng = np.random.default_rng(3)
    texts = sequences(3, 300, 17, 16, 2, 260, 1, *rng.integers(1, 70, 26).tolist())
    expected = all_alone(backend, pages, texts)
    for name, text in texts.items():
        run_chunks(backend, pages, {name: text}, [{name: len(text)}])
    names = list(texts)
    batches = [names[turn:] + names[:turn] for turn in range(0, 32, 3)]
    batches += [rng.permutation(names)[:size].tolist() for size in range(1, 32)]
    for batch in batches:  # the same keys and values are written again and again
        logits = backend.forward(pages.batch([(name, texts[name][-1:], len(texts[name]) - 1) for name in batch]))
        np.testing.assert_array_equal(logits, [expected[name][-1] for name in batch])


@each_case
@pytest.mark.parametrize("num_threads", [1, 3, pytest.param(2, marks=LONG)])
def test_around_the_borders_of_stretches(model: str, numbers: str, num_threads: int, pages: Any) -> None:
    """One token, and five as with drafted tokens.

    Alone, their context is split among the threads; beside others it is not.
    """
    backend = backend_of(model, numbers, num_threads=num_threads)
    texts = sequences(4, 2 * STRETCH + 6, *[20] * 31)
    long, *others = texts
    expected = run_whole(backend, pages, texts[long])
    run_chunks(backend, pages, texts, [{name: len(text)} for name, text in texts.items()])
    beside = [(name, texts[name][-1:], 19) for name in others]
    borders = [border + offset for border in (STRETCH, 2 * STRETCH) for offset in (-1, 0, 1, 4)]
    for end in (1, 5, *borders):
        for start in (end - 1, max(end - 5, 0)):
            part = (long, texts[long][start:end], start)
            np.testing.assert_array_equal(backend.forward(pages.batch([part])), expected[start:end])
            together = backend.forward(pages.batch([*beside[:10], part, *beside[10:]]))
            np.testing.assert_array_equal(together[10 : 10 + end - start], expected[start:end])


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("num_threads", [3, pytest.param(1, marks=LONG)])
def test_smollm2_in_a_context_of_2000_tokens(numbers: str, num_threads: int, pages: Any) -> None:
    texts = sequences(5, 2011, 9, 300)
    long, short, middle = texts
    expected = all_alone(backend_of("smollm2", numbers), pages, texts)
    steps = [{long: 1500}, {long: 5}, {long: 1}, {middle: 293, long: 500}]
    steps += [{short: 1, long: 1, middle: 1}] * 4 + [{short: 5, long: 1, middle: 3}]
    found = run_chunks(backend_of("smollm2", numbers, num_threads=num_threads), pages, texts, steps)
    assert_same_bits(found, expected)


@each_case
@pytest.mark.parametrize("num_threads", [1, 3])
def test_number_of_threads(model: str, numbers: str, num_threads: int, pages: Any) -> None:
    texts = sequences(6, 270, 33, 1, 90)
    expected = all_alone(backend_of(model, numbers), pages, texts)
    backend = backend_of(model, numbers, num_threads=num_threads)
    assert_same_bits(run_chunks(backend, pages, texts, random_steps(6, texts)), expected)


@each_case
@pytest.mark.parametrize("isa", supported_isas())
def test_instruction_sets(model: str, numbers: str, isa: str, pages: Any) -> None:
    """Each of them keeps the promise, and all have the same bits.  The generic one is slow."""
    texts = sequences(7, 10, 3, 6, 270 if model == "odd" else 1)
    expected = all_alone(backend_of(model, numbers), pages, texts)
    backend = backend_of(model, numbers, isa=isa)
    assert_same_bits(run_chunks(backend, pages, texts, random_steps(7, texts)), expected)


@each_case
def test_a_prefix_that_another_sequence_computed(model: str, numbers: str, pages: Any) -> None:
    """Shared blocks, as the prefix cache has them; and the same tokens in other blocks, as after a preemption."""
    backend = backend_of(model, numbers)
    first, second = sequences(8, 150, 200).values()
    second[:135] = first[:135]
    expected = run_whole(backend, pages, second)
    run_chunks(backend, pages, {"first": first}, [{"first": 100}, {"first": 50}])
    pages.tables["second"] = pages.tables["first"][:8]
    shared = 8 * POOL["block_size"]
    rest = backend.forward(pages.batch([("first", first[-1:], 149), ("second", second[shared:], shared)]))[1:]
    np.testing.assert_array_equal(rest, expected[shared:])
    again = run_chunks(backend, pages, {"again": second}, [{"again": 160}, {"again": 40}])
    np.testing.assert_array_equal(again["again"], expected)


# `paged` is a class, which no example can leave in another state.
@pytest.mark.parametrize("model", MODELS)
@settings(
    max_examples=examples(20),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    numbers=st.sampled_from(list(NUMBERS)),
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=6),
)
def test_any_schedule(model: str, numbers: str, seed: int, lengths: list[int], paged: Any) -> None:
    backend, pages = backend_of(model, numbers), paged(**POOL)
    texts = sequences(seed, *lengths)
    expected = all_alone(backend, pages, texts)
    assert_same_bits(run_chunks(backend, pages, texts, random_steps(seed, texts)), expected)
