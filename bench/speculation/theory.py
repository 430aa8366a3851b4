"""What speculation can gain at most, by the costs of verification and drafting and by the acceptance rate.

A proposal of k tokens, each accepted with probability a if those before it are, gives (1 - a^(k+1)) / (1 - a) tokens
(Leviathan et al. 2022, equation 1).  It costs v(k) + k c steps: v(k) is the time of k + 1 rows relative to that of one
row, and c that of a drafted token.  A dense model reads its weights once for all rows.  A mixture of experts reads more
experts the more rows there are, so that v(k) grows with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from shoal.model.record import ModelRecord
from shoal.model.step.batch import Backend, DraftBatch, ForwardBatch, Int32, SamplingBatch
from shoal.model.step.sampling import sampling_rows

Intp = NDArray[np.intp]
Work = Callable[[int], Callable[[], object]]  # turn -> a step to be timed

BLOCK_SIZE = 16
CONTEXT = 192
MOST_SPEC_TOKENS = 8
_WARM_UP, _STEPS_IN_A_ROW = 2, 8


@dataclass(frozen=True)
class Costs:
    """Median costs on this machine, at one concurrency.

    Attributes:
        seconds: time of a step without drafted tokens.
        verification: v(k) for k from 0 on.
        drafting: c, the cost of a drafted token for every request.
    """

    seconds: float
    verification: tuple[float, ...]
    drafting: float


def speed_up(
    acceptance: float, num_spec_tokens: int, verification: float, drafting: float, share: float = 1.0
) -> float:
    """Return the gain of proposals of one length.

    Args:
        acceptance: chance that a token is accepted if all before it are.
        verification: cost of a step relative to a step without speculation; the mean if some have no proposal.
        drafting: cost of a drafted token, relative to the same.
        share: share of the steps that have a proposal; a proposer that looks up does not always find one.
    """
    tokens = sum(acceptance**i for i in range(num_spec_tokens + 1))
    return (share * tokens + 1 - share) / (verification + share * num_spec_tokens * drafting)


class Machine:
    """Times steps of the target and of drafting.

    Args:
        text: token ids; each sequence has another part, so that a router chooses experts as in real text.
        most_seqs: largest number of sequences.
        create: makes the backend of a model with this number of blocks of BLOCK_SIZE tokens.
        draft: the draft model; None if drafting runs no other model.
        draft_layers: number of layers of the target that draft; None if they do not.
    """

    def __init__(
        self,
        target: ModelRecord,
        text: list[int],
        most_seqs: int,
        *,
        create: Callable[[ModelRecord, int], Backend],
        draft: ModelRecord | None,
        draft_layers: int | None,
    ) -> None:
        length = CONTEXT + MOST_SPEC_TOKENS + 1
        self._blocks_per_seq = -(-length // BLOCK_SIZE)
        self._texts = np.resize(np.array(text, np.int32), (most_seqs, length))
        self._create = create
        self._target = self._backend(target, most_seqs)
        self._draft = self._backend(draft, most_seqs) if draft else self._target if draft_layers else None
        self._draft_layers = draft_layers

    def costs(self, num_seqs: int, repeats: int) -> Costs:
        """Measure steps of every number of rows in turns."""
        sizes = range(MOST_SPEC_TOKENS + 1)
        works = [self._verification(num_seqs, k + 1) for k in sizes]
        if self._draft is not None:
            works.append(self._drafting(num_seqs))  # of MOST_SPEC_TOKENS tokens
        seconds = _in_turns(works, repeats)
        drafting = seconds[-1] / MOST_SPEC_TOKENS / seconds[0] if self._draft is not None else 0.0
        return Costs(seconds[0], tuple(seconds[k] / seconds[0] for k in sizes), drafting)

    def _backend(self, record: ModelRecord, most_seqs: int) -> Backend:
        backend = self._create(record, most_seqs * self._blocks_per_seq)
        for seq in range(most_seqs):
            backend.forward(self._step(np.array([seq]), 0, CONTEXT))
        return backend

    def _verification(self, num_seqs: int, num_rows: int) -> Work:
        """Return steps with other tokens in each turn, so that they read other experts, as in a text that goes on."""
        sampling = _greedy(num_seqs * num_rows)
        seqs = np.arange(num_seqs)

        def prepare(turn: int) -> Callable[[], object]:
            batch = self._step(seqs, CONTEXT, num_rows)
            batch.token_ids = np.roll(self._texts.flatten(), -17 * turn - 5 * num_rows)[: num_seqs * num_rows].copy()
            return lambda: self._target.execute(batch, sampling)

        return prepare

    def _drafting(self, num_seqs: int) -> Work:
        assert self._draft is not None
        backend, layers = self._draft, self._draft_layers
        batch = DraftBatch(
            rows=np.arange(num_seqs, dtype=np.int32),
            starts=np.full(num_seqs, CONTEXT - 1, np.int32),
            ends=np.full(num_seqs, CONTEXT, np.int32),
            num_wanted=np.full(num_seqs, MOST_SPEC_TOKENS, np.int32),
            token_ids=self._texts,
            block_tables=self._tables(np.arange(num_seqs)),
            block_size=BLOCK_SIZE,
        )
        sampling = _greedy(num_seqs)
        return lambda turn: lambda: backend.draft(batch, sampling, layers)

    def _tables(self, seqs: Intp) -> Int32:
        """Return block tables, [num_seqs, blocks_per_seq]: each sequence has its own blocks."""
        first = seqs[:, None] * self._blocks_per_seq
        return (first + np.arange(self._blocks_per_seq)).astype(np.int32)

    def _step(self, seqs: Intp, start: int, num_rows: int) -> ForwardBatch:
        """Return a step of `num_rows` tokens of each sequence, from position `start` on."""
        positions = np.arange(start, start + num_rows, dtype=np.int32)
        tables = self._tables(seqs)
        slots = tables[:, positions // BLOCK_SIZE] * np.int32(BLOCK_SIZE) + positions % BLOCK_SIZE
        num_tokens = len(seqs) * num_rows
        return ForwardBatch(
            token_ids=self._texts[seqs][:, positions].flatten(),
            positions=np.tile(positions, len(seqs)),
            slot_mapping=slots.flatten(),
            query_start_loc=np.arange(0, num_tokens + 1, num_rows, dtype=np.int32),
            context_lens=np.full(len(seqs), start + num_rows, np.int32),
            block_tables=tables,
            logits_indices=np.arange(num_tokens, dtype=np.int32),
        )


def expert_bytes(record: ModelRecord, num_rows: int) -> float:
    """Return the bytes of float32 experts that `num_rows` rows read if the router chooses evenly; 0 if dense."""
    config = record.config
    if not config.num_experts:
        return 0.0
    touched = config.num_experts * (1 - (1 - config.num_experts_per_tok / config.num_experts) ** num_rows)
    return 4.0 * config.num_layers * touched * 3 * config.intermediate_size * config.hidden_size


def _greedy(num_logits: int) -> SamplingBatch:
    return SamplingBatch(sampling_rows(num_logits, temperature=0))


def _in_turns(works: list[Work], repeats: int) -> list[float]:
    """Return the median time of each kind of step.

    Steps of one kind follow each other, as in serving: each finds in the CPU's caches what the last one left there.
    """
    times: list[list[float]] = [[] for _ in works]
    for turn in range(-(-repeats // _STEPS_IN_A_ROW)):
        for work, found in zip(works, times, strict=True):
            for number in range(_WARM_UP + _STEPS_IN_A_ROW):
                step = work(turn * (_WARM_UP + _STEPS_IN_A_ROW) + number)
                began = time.perf_counter()
                step()
                if number >= _WARM_UP:
                    found.append(time.perf_counter() - began)
    return [median(found) for found in times]
