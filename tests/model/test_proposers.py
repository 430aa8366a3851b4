"""What proposers draft, and what a draft model reads before it drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.record import ModelRecord
from shoal.model.speculation.draft_model import DraftModelProposer
from shoal.model.speculation.proposer import Candidate, Proposer
from shoal.model.speculation.self_speculative import SelfSpeculativeProposer
from shoal.model.speculation.suffix import SuffixProposer
from shoal.model.speculation.texts import SIZES, Texts
from shoal.model.step.batch import Backend, DraftBatch, ForwardBatch, SamplingBatch
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import sample_reference
from shoal.scheduler.output import NewRequest, ScheduledRequest, StepResult
from tests.fakes import params
from tests.model.oracles import random_record, sequences

BLOCK_SIZE = 16
VOCAB_SIZE = 96


def join(
    rows: BatchRows,
    proposer: Any,
    tokens: list[int],
    blocks: list[int],
    *,
    num_found: int = 0,
    row: int = 0,
    salt: str = "",
    **sampling: Any,
) -> int:
    """A request joins with its whole block table; `num_found` of its tokens stand in the prefix cache."""
    new = NewRequest(tokens, len(tokens), params(max_tokens=50, **sampling), cache_salt=salt)
    share = ScheduledRequest("a", row, num_found, len(tokens) - num_found, blocks, len(blocks), True, [], new)
    rows.place(share)
    proposer.place(share)
    return row


def propose(proposer: Proposer, candidates: list[Candidate]) -> list[list[int]]:
    proposer.catch_up(candidates)
    proposals = proposer.propose(candidates)
    return [proposals[one.row].token_ids for one in candidates]


# -- suffix decoding ---------------------------------------------------------------------------------------------


def look_up(text: list[int], num_wanted: int, others: Sequence[list[int]] = ()) -> list[int]:
    """The specification, by brute force: find where the last 8 tokens, else 4, 3 or 2, last stood before.

    They are looked up in the text, and 8 or 4 of them in the other texts, the last one first.  What follows there is
    proposed, in the text itself read on into the proposal; after fewer than 8, at most twice as many tokens, or as many
    tokens of another text.
    """
    for size in (8, 4, 3, 2):
        count = num_wanted if size == 8 else min(num_wanted, 2 * size)
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                longer = list(text)
                for index in range(count):
                    longer.append(longer[start + size + index])
                return longer[len(text) :]
        for other in reversed(others):
            for end in range(len(other) - 1, size - 1, -1):
                if size >= 4 and other[end - size : end] == text[-size:]:
                    return other[end : min(end + (count if size == 8 else min(count, size)), len(other))]
    return []


def step(proposer: SuffixProposer, row: int, known: int, num_chosen: int = 1) -> None:
    """A step chose the last of `known` tokens; the rows hold them."""
    share = ScheduledRequest("a", row, known - num_chosen - 1, 1, [], 1, True, [], None)
    proposer.stepped([share], StepResult([[0] * num_chosen]))


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    grown=st.lists(st.integers(1, 5), max_size=10),
    num_wanted=st.integers(1, 16),
    others=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), max_size=3),
)
def test_what_followed_the_longest_run_that_stood_before_is_proposed(
    text: list[int], grown: list[int], num_wanted: int, others: list[list[int]]
) -> None:
    rows = BatchRows(2, 64, BLOCK_SIZE)
    proposer = SuffixProposer(rows)
    for other in others:
        end(rows, proposer, other)
    row = join(rows, proposer, text, [0], row=1)
    known = 1
    for more in [*grown, len(text)]:
        known = min(known + more, len(text))
        (drafted,) = propose(proposer, [Candidate(row, known, num_wanted)])
        assert drafted == look_up(text[:known], num_wanted, others)


def end(rows: BatchRows, proposer: SuffixProposer, text: list[int], *, salt: str = "") -> None:
    """A request of the salt generates the last token of the text, and leaves."""
    row = join(rows, proposer, text, [0], salt=salt)
    step(proposer, row, len(text))
    rows.leave(row)
    proposer.leave(row)


def test_what_is_found_in_the_prefix_cache_is_not_kept_again() -> None:
    rows = BatchRows(2, 64, BLOCK_SIZE)
    proposer = SuffixProposer(rows)
    row = join(rows, proposer, [*range(32), 60], [0, 1, 2], num_found=16)
    step(proposer, row, 33)
    proposer.leave(row)
    row = join(rows, proposer, [4, 5, 6, 7], [0])
    assert propose(proposer, [Candidate(row, 4, 4)]) == [[]]
    row = join(rows, proposer, [12, 13, 14, 15], [0])
    assert propose(proposer, [Candidate(row, 4, 4)]) == [[16, 17, 18, 19]], "but a run may begin there"


def test_texts_are_found_while_their_requests_run() -> None:
    rows = BatchRows(2, 128, BLOCK_SIZE)
    proposer = SuffixProposer(rows)
    row, other = list(range(100)), [50, 51, 52, 53]
    join(rows, proposer, row, [0] * 8)
    join(rows, proposer, other, [0], row=1)
    assert propose(proposer, [Candidate(1, 4, 4)]) == [[]]
    step(proposer, 0, 100, num_chosen=3)
    assert propose(proposer, [Candidate(1, 4, 4)]) == [[54, 55, 56, 57]]


def test_texts_of_another_salt_are_not_found() -> None:
    rows = BatchRows(2, 64, BLOCK_SIZE)
    proposer = SuffixProposer(rows)
    end(rows, proposer, [1, 2, 3, 4, 5, 6], salt="a")
    for salt, expected in (("b", []), ("", []), ("a", [5, 6])):
        row = join(rows, proposer, [1, 2, 3, 4], [0], row=1, salt=salt)
        assert propose(proposer, [Candidate(row, 4, 4)]) == [expected]


def test_of_many_salts_those_used_last_are_known() -> None:
    rows = BatchRows(2, 64, BLOCK_SIZE)
    proposer = SuffixProposer(rows)
    end(rows, proposer, [1, 2, 3, 4, 5], salt="a")
    end(rows, proposer, [1, 2, 3, 4, 6], salt="b")
    for number in range(15):
        if number == 7:
            join(rows, proposer, [1, 2, 3, 4], [0], row=1, salt="a")
        end(rows, proposer, [7, 8, 9], salt=f"{number}")
    for salt, expected in (("a", [5]), ("b", [])):
        row = join(rows, proposer, [1, 2, 3, 4], [0], row=1, salt=salt)
        assert propose(proposer, [Candidate(row, 4, 4)]) == [expected]


def test_a_text_ends_with_its_request() -> None:
    rows = BatchRows(1, 64, BLOCK_SIZE)
    proposer = SuffixProposer(rows)
    row = join(rows, proposer, [1, 2, 3, 1, 2], [0])
    assert propose(proposer, [Candidate(row, 5, 1)]) == [[3]]
    rows.leave(row)
    proposer.leave(row)
    join(rows, proposer, [1, 2], [1])
    assert propose(proposer, [Candidate(row, 2, 1)]) == [[]], "fewer than four tokens are looked up in the text alone"


@given(
    texts=st.lists(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 2), min_size=1, max_size=80), min_size=1),
    run=st.lists(st.integers(0, 2), min_size=1, max_size=8),
)
def test_of_many_texts_the_last_are_found(texts: list[list[int]], run: list[int]) -> None:
    """Room for 64 tokens: at least the last 32 of them, with a place behind each text, are there."""
    kept = Texts(64)
    recent: list[int] = []
    for text in texts:
        kept.add(np.array(text, np.int32))
        recent = [*recent, *text[-31:], -1]
    found = kept.find(np.array(run, np.int32))
    for size in SIZES:
        ends = [end for end in range(size, len(recent)) if recent[end - size : end] == run[-size:] and recent[end] >= 0]
        if len(run) < size or not ends:
            assert size not in found
        elif size in found or len(recent) - ends[-1] + size <= 32:
            following = recent[ends[-1] : ends[-1] + 5]
            expected = following[: following.index(-1)] if -1 in following else following
            assert kept.after(found[size], 5) == expected


# -- a draft model -----------------------------------------------------------------------------------------------


class ReadingBackend:
    """Drafts the last token plus one; records what it is asked to read, as (start, tokens)."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.reads: list[list[tuple[int, list[int]]]] = []

    def forward(self, batch: ForwardBatch, num_layers: int | None = None) -> np.ndarray:
        assert not len(batch.logits_indices)
        bounds = zip(batch.query_start_loc[:-1].tolist(), batch.query_start_loc[1:].tolist(), strict=True)
        self.reads.append([(int(batch.positions[a]), batch.token_ids[a:b].tolist()) for a, b in bounds])
        return np.empty((0, VOCAB_SIZE), np.float32)

    def draft(self, batch: DraftBatch, sampling: SamplingBatch, num_layers: int | None = None) -> np.ndarray:
        bounds = zip(batch.rows.tolist(), batch.starts.tolist(), batch.ends.tolist(), strict=True)
        self.reads.append([(start, batch.token_ids[row, start:end].tolist()) for row, start, end in bounds])
        last = batch.token_ids[batch.rows, batch.ends - 1]
        return last[:, None] + np.arange(1, batch.num_wanted[0] + 1, dtype=np.int32)


def draft_of(rows: BatchRows, *, max_catch_up: int = 100) -> tuple[DraftModelProposer, ReadingBackend]:
    backend = ReadingBackend()
    proposer = DraftModelProposer(
        backend,  # type: ignore[arg-type]  # all that a draft needs of it
        rows,
        num_blocks=64,
        max_catch_up=max_catch_up,
        draws_apart=False,
    )
    return proposer, backend


def draft(rows: BatchRows, proposer: DraftModelProposer, row: int, known: list[int], k: int) -> list[int]:
    rows.token_ids[row, : len(known)] = known
    (drafted,) = propose(proposer, [Candidate(row, len(known), k)])
    return drafted


@pytest.mark.parametrize(
    ("accepted", "reads"),
    [
        ([14, 15, 16, 40], (6, [16, 40])),  # all: the draft has not read its last token
        ([14, 15, 40], (6, [40])),
        ([14, 40], (5, [40])),
        ([40], (4, [40])),
    ],
    ids=["all", "mismatch at the last", "in the middle", "at the first"],
)
def test_a_draft_reads_the_tokens_that_it_did_not_draft(accepted: list[int], reads: tuple[int, list[int]]) -> None:
    rows = BatchRows(2, 64, BLOCK_SIZE)
    proposer, backend = draft_of(rows)
    row = join(rows, proposer, [10, 11, 12], [3])
    known = [10, 11, 12, 13]
    assert draft(rows, proposer, row, known, 3) == [14, 15, 16]
    assert backend.reads == [[(0, known)]]
    draft(rows, proposer, row, known + accepted, 3)
    assert backend.reads[1] == [reads]


def test_a_draft_that_skipped_steps_catches_up() -> None:
    rows = BatchRows(2, 64, BLOCK_SIZE)
    proposer, backend = draft_of(rows)
    row = join(rows, proposer, [10, 11, 12], [3])
    draft(rows, proposer, row, [10, 11, 12, 13], 3)
    draft(rows, proposer, row, [10, 11, 12, 13, 14, 50, 51, 52], 1)
    assert backend.reads[1] == [(5, [50, 51, 52])]


def test_long_prompts_are_read_in_parts_before_any_token_is_drafted() -> None:
    rows = BatchRows(3, 128, BLOCK_SIZE)
    proposer, backend = draft_of(rows, max_catch_up=24)
    long, other, short = list(range(100, 150)), list(range(40)), [60, 61, 62]
    first = join(rows, proposer, long, [0, 1, 2, 3])
    second = join(rows, proposer, other, [4, 5, 6], row=1)
    third = join(rows, proposer, short, [7], row=2)
    candidates = [Candidate(first, 50, 2), Candidate(second, 40, 2), Candidate(third, 3, 2)]
    assert propose(proposer, candidates) == [[], [], [63, 64]], "a row does not wait for rows that are behind"
    assert backend.reads == [[(0, long[:24])], [(0, short)]]
    assert propose(proposer, candidates[:2]) == [[150, 151], []]
    assert propose(proposer, candidates[1:2]) == [[40, 41]]
    assert backend.reads[2:4] == [[(24, long[24:48])], [(48, long[48:])]]
    assert backend.reads[4:] == [[(0, other[:24])], [(24, other[24:])]]


def test_a_prefix_that_the_draft_has_read_is_not_read_again() -> None:
    rows = BatchRows(3, 64, BLOCK_SIZE)
    proposer, backend = draft_of(rows)
    prompt = list(range(40))
    row = join(rows, proposer, prompt, [5, 6, 7])
    draft(rows, proposer, row, prompt, 1)
    rows.leave(row)
    row = join(rows, proposer, [*prompt[:32], 90], [5, 6, 9], num_found=32)
    draft(rows, proposer, row, [*prompt[:32], 90], 1)
    assert backend.reads[-1] == [(32, [90])]
    # A block that was given to another request, which the draft has not read, is a new block.
    join(rows, proposer, [1, 2], [6], row=1)
    row = join(rows, proposer, [*prompt[:32], 91], [5, 6, 10], num_found=32)
    draft(rows, proposer, row, [*prompt[:32], 91], 1)
    assert backend.reads[-1] == [(16, [*prompt[16:32], 91])]


def test_of_a_prompt_that_ends_with_a_block_the_draft_reads_the_last_token_again() -> None:
    rows = BatchRows(3, 64, BLOCK_SIZE)
    proposer, backend = draft_of(rows)
    prompt = list(range(32))
    row = join(rows, proposer, prompt, [5, 6, 7])
    draft(rows, proposer, row, [*prompt, 90], 1)
    rows.leave(row)
    row = join(rows, proposer, prompt, [5, 6, 8], num_found=31)
    draft(rows, proposer, row, [*prompt, 91], 1)
    assert backend.reads[-1] == [(31, [31, 91])]


# -- drafting with a real model ----------------------------------------------------------------------------------


def make_backend(kind: str, record: ModelRecord, num_blocks: int = 32) -> Backend:
    if kind == "torch":
        return TorchBackend(record, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    return NativeBackend(record, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_threads=2)


BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")),
]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("num_layers", [None, 2])
@pytest.mark.parametrize("window", [0, [20, 0, 0]])
def test_drafted_tokens_are_what_the_backend_chooses_token_by_token(
    kind: str,
    num_layers: int | None,
    window: Any,
    paged: Any,
    sampling_batch: Callable[..., SamplingBatch],
) -> None:
    record = random_record(3, num_layers=3, window=window)
    num_groups = len(record.config.cache_groups)
    assert num_groups == (3 if window else 1)
    num_blocks = 24 * num_groups
    one, other = make_backend(kind, record, num_blocks), make_backend(kind, record, num_blocks)
    texts = list(sequences(5, 40, 14, 1).values())
    tokens = np.zeros((6, 64), np.int32)
    tables = np.random.default_rng(2).permutation(num_blocks).astype(np.int32).reshape(6, 4 * num_groups)
    for row, text in zip((4, 0, 2), texts, strict=True):
        tokens[row, : len(text)] = text
    lengths = np.array([len(text) for text in texts], np.int32)
    batch = DraftBatch(
        rows=np.array([4, 0, 2], np.int32),
        starts=np.zeros(3, np.int32),
        ends=lengths,
        num_wanted=np.array([5, 3, 1], np.int32),
        token_ids=tokens,
        block_tables=tables,
        block_size=BLOCK_SIZE,
        num_groups=num_groups,
    )
    sampling = sampling_batch(
        3,
        temperature=[0.0, 1.0, 0.7],
        seed=[1, 2, 3],
        position=lengths,
        top_p=0.9,
        biases=[(0, 5, 1.0), (2, 7, 2.0)],
    )

    def oracle(text: list[int], row: int, count: int) -> list[int]:
        """Choose each token from the logits of the whole text before it."""
        chosen: list[int] = []
        for index in range(count):
            whole = paged(num_blocks, BLOCK_SIZE, num_groups).batch([("a", text + chosen, 0)], all_logits=False)
            how = sampling_batch(
                1,
                temperature=[0.0, 1.0, 0.7][row],
                seed=row + 1,
                position=len(text) + index,
                top_p=0.9,
                biases=[[(0, 5, 1.0)], [], [(0, 7, 2.0)]][row],
            )
            chosen.append(int(sample_reference(other.forward(whole, num_layers), how).token_ids[0]))
        return chosen

    drafted = one.draft(batch, sampling, num_layers)
    expected = [oracle(text, row, count) for row, (text, count) in enumerate(zip(texts, (5, 3, 1), strict=True))]
    assert [row[row >= 0].tolist() for row in drafted] == expected


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_first_two_layers_compute_as_a_model_of_two_layers(kind: str, paged: Any) -> None:
    record = random_record(3, num_layers=3)
    shorter = replace(record, layers=record.layers[:2], config=replace(record.config, layers=record.config.layers[:2]))
    batch = paged(32, BLOCK_SIZE).batch([("a", text, 0) for text in sequences(5, 20).values()])
    whole, part = make_backend(kind, record), make_backend(kind, shorter)
    np.testing.assert_array_equal(whole.forward(batch, 2), part.forward(batch))
    assert (whole.forward(batch) != part.forward(batch)).any()


def test_self_speculation_reads_only_the_last_token() -> None:
    rows = BatchRows(2, 64, BLOCK_SIZE)
    backend = ReadingBackend()
    proposer = SelfSpeculativeProposer(backend, rows, num_layers=1, draws_apart=False)  # type: ignore[arg-type]
    row = join(rows, proposer, [10, 11, 12], [3])
    assert propose(proposer, [Candidate(row, 3, 2)]) == [[13, 14]]
    assert backend.reads == [[(2, [12])]]
