"""What the native backend refuses before it calls its C++ code, which trusts its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import MAX_EXPERTS, MAX_HEAD_DIM, supported_isas
from shoal.model.record import ModelRecord
from shoal.model.step.batch import ForwardBatch, SamplingBatch
from shoal.scheduler.errors import CheckpointError, ConfigError
from tests.model.oracles import random_record

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

POOL = {"num_blocks": 8, "block_size": 16}


def make_backend(record: ModelRecord, **how: Any) -> NativeBackend:
    return NativeBackend(record, **{**POOL, "num_threads": 1, **how})


def changed(index: int | tuple[int, ...], value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


def shorter(array: np.ndarray) -> np.ndarray:
    return array[:-1].copy()


# The arrays whose memory the native code reads or writes.
PASSED = [field.name for field in fields(ForwardBatch) if field.name != "context_lens"]
# The good batch: sequence a's tokens 18 to 23 and b's first 3, in blocks of 16, of 8 blocks and 40 tokens' positions.
WRONG: list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = [
    *[(f"{field}-negative", field, changed(0, -1)) for field in ("token_ids", "positions", "slot_mapping")],
    *[(f"{field}-lowest", field, changed(0, -(2**31))) for field in ("token_ids", "positions", "slot_mapping")],
    ("token_ids-beyond-the-vocabulary", "token_ids", changed(3, 96)),
    ("positions-beyond-the-model", "positions", lambda a: a + np.int32(100)),
    ("positions-that-leap", "positions", changed(2, 30)),
    ("positions-that-repeat", "positions", changed(1, 18)),
    ("positions-of-the-next-sequence", "positions", changed(6, 24)),
    ("positions-before-the-context", "positions", lambda a: a - np.repeat(np.array([1, 0], np.int32), [6, 3])),
    ("slot_mapping-beyond-the-cache", "slot_mapping", changed((0, 8), 8 * 16)),
    ("block_tables-negative", "block_tables", changed((0, 1), -1)),
    ("block_tables-beyond-the-cache", "block_tables", changed((1, 0), 8)),
    ("block_tables-too-narrow", "block_tables", lambda a: a[:, :1].copy()),
    ("query_start_loc-not-from-0", "query_start_loc", changed(0, 1)),
    ("query_start_loc-not-to-the-end", "query_start_loc", changed(2, 8)),
    ("query_start_loc-beyond-the-end", "query_start_loc", changed(2, 10)),
    ("query_start_loc-descends", "query_start_loc", changed(1, 10)),
    ("query_start_loc-without-queries", "query_start_loc", changed(1, 9)),
    ("context_lens-too-long", "context_lens", changed(0, 25)),
    ("context_lens-too-short", "context_lens", changed(1, 2)),
    ("context_lens-0", "context_lens", changed(1, 0)),
    ("logits_indices-negative", "logits_indices", changed(0, -1)),
    ("logits_indices-beyond-the-tokens", "logits_indices", changed(1, 9)),
    ("logits_indices-repeated", "logits_indices", lambda a: np.zeros(100, np.int32)),
    ("logits_indices-descend", "logits_indices", lambda a: a[::-1].copy()),
    *[(f"{field}-shorter", field, shorter) for field in ("token_ids", "positions", "slot_mapping", "query_start_loc")],
    *[(f"{field}-shorter", field, shorter) for field in ("context_lens", "block_tables", "hidden", "inputs")],
    *[(f"{field}-of-64-bits", field, lambda a: a.astype(np.int64)) for field in PASSED],
    *[(f"{field}-with-gaps", field, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]) for field in PASSED],
]


@pytest.mark.parametrize(("field", "change"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_arrays_are_refused_before_the_call(
    field: str, change: Callable[[np.ndarray], np.ndarray], paged: Any, sampling_batch: Callable[..., SamplingBatch]
) -> None:
    """Also right after the same batch without the fault, of which the checked parts need not be checked again."""
    backend, pages = make_backend(random_record(max_position_embeddings=40)), paged(**POOL)
    pages.batch([("a", [0] * 18, 0)])
    good = pages.batch([("a", [1, 2, 3, 4, 5, 6], 18), ("b", [7, 8, 9], 0)], all_logits=False)
    good.hidden, good.inputs = (np.zeros((9, 32), np.float32) for _ in range(2))
    bad = replace(good, **{field: change(getattr(good, field))})

    def check_refusal() -> None:
        with pytest.raises(AssertionError):
            backend.forward(bad)
        with pytest.raises(AssertionError):
            backend.execute(bad, sampling_batch(len(bad.logits_indices)))

    check_refusal()
    expected = backend.forward(good)
    check_refusal()
    np.testing.assert_array_equal(backend.forward(good), expected)


def test_as_many_choices_as_logits(paged: Any, sampling_batch: Callable[..., SamplingBatch]) -> None:
    backend, pages = make_backend(random_record()), paged(**POOL)
    batch = pages.batch([("a", [1, 2, 3], 0)])
    for num_rows in (0, 2, 4):
        with pytest.raises(AssertionError):
            backend.execute(batch, sampling_batch(num_rows))
    assert len(backend.execute(batch, sampling_batch(3)).token_ids) == 3


@pytest.mark.parametrize(
    ("field", "limit", "others"),
    [
        ("head_dim", MAX_HEAD_DIM, {}),
        ("num_experts", MAX_EXPERTS, {"num_experts_per_tok": 1, "intermediate_size": 1}),
    ],
)
def test_shapes_that_are_too_large(field: str, limit: int, others: dict[str, int]) -> None:
    record = random_record(**{field: limit + 2}, **others)
    with pytest.raises(CheckpointError, match=f"{field} {limit + 2} exceeds the {limit} ") as caught:
        make_backend(record)
    assert caught.value.param == field


def test_more_memory_than_there_is() -> None:
    with pytest.raises(ConfigError, match="not enough memory"):
        make_backend(random_record(max_position_embeddings=64), num_blocks=2**40)


def test_a_library_that_is_not_there() -> None:
    with pytest.raises(LookupError, match="no native library for mmx"):
        make_backend(random_record(), isa="mmx")
