"""What speculation can gain at most, by the costs of verification and drafting and by the acceptance rate.

A proposal of k tokens, each accepted with probability a if those before it are, gives (1 - a^(k+1)) / (1 - a) tokens
(Leviathan et al. 2022, equation 1).  It costs v(k) + k c steps: v(k) is the time of k + 1 rows relative to that of one
row, and c that of a drafted token.  A dense model reads its weights once for all rows.  A mixture of experts reads more
experts the more rows there are, so that v(k) grows with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from statistics import median
from typing import NamedTuple

import numpy as np

from bench.steps import BLOCK_SIZE, block_tables, equal_shares, greedy, in_turns, seconds
from shoal.model.step.batch import Backend, DraftBatch, Int32

CONTEXT = 192
MOST_SPEC_TOKENS = 8
BLOCKS_PER_SEQ = (CONTEXT + MOST_SPEC_TOKENS) // BLOCK_SIZE + 1
_STEPS_IN_A_ROW = 8


class Costs(NamedTuple):
    """Median costs on this machine, at one concurrency.

    Attributes:
        seconds: time of a step without drafted tokens.
        verification: v(k) for k from 0 on.
        drafting: c, the cost of a drafted token for every request.
    """

    seconds: float
    verification: list[float]
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


def measure_costs(
    target: Backend, draft: Backend | None, draft_layers: int | None, text: list[int], *, num_seqs: int, repeats: int
) -> Costs:
    """Measure steps of every number of rows in turns.

    Steps of one kind follow each other, as in serving: each finds in the CPU's caches what the last one left there.

    Args:
        draft: backend that drafts; None if drafting runs no model.
        draft_layers: number of its layers that draft; None is all.
        text: token ids; each sequence has another part, so that a router chooses experts as in real text.
    """
    texts = np.resize(np.array(text, np.int32), (num_seqs, CONTEXT + MOST_SPEC_TOKENS + 1))
    for backend in {target, draft or target}:
        for start in range(0, CONTEXT, BLOCK_SIZE):
            backend.forward(equal_shares(texts[:, start : start + BLOCK_SIZE], start, BLOCKS_PER_SEQ, 1)[0])
    works = [_verification(target, texts, k + 1) for k in range(MOST_SPEC_TOKENS + 1)]
    if draft is not None:
        works.append(_drafting(draft, draft_layers, texts))
    times = in_turns(works, -(-repeats // _STEPS_IN_A_ROW), in_a_row=_STEPS_IN_A_ROW)
    plain, *others = map(median, times)
    drafting = others.pop() / MOST_SPEC_TOKENS / plain if draft is not None else 0.0
    return Costs(plain, [1.0, *(other / plain for other in others)], drafting)


def _verification(target: Backend, texts: Int32, num_rows: int) -> Callable[[], float]:
    """Return steps with other tokens each time, so that they read other experts, as in a text that goes on."""
    batch, sampling = equal_shares(texts[:, :num_rows], CONTEXT, BLOCKS_PER_SEQ)
    turns = count()

    def step() -> float:
        shifted = np.roll(texts.flatten(), -17 * next(turns) - 5 * num_rows)
        batch.token_ids = shifted[: len(batch.token_ids)].copy()
        return seconds(lambda: target.execute(batch, sampling))

    return step


def _drafting(backend: Backend, num_layers: int | None, texts: Int32) -> Callable[[], float]:
    """Return steps that draft MOST_SPEC_TOKENS tokens for each sequence."""
    num_seqs = len(texts)
    batch = DraftBatch(
        rows=np.arange(num_seqs, dtype=np.int32),
        starts=np.full(num_seqs, CONTEXT - 1, np.int32),
        ends=np.full(num_seqs, CONTEXT, np.int32),
        num_wanted=np.full(num_seqs, MOST_SPEC_TOKENS, np.int32),
        token_ids=texts,
        block_tables=block_tables(num_seqs, BLOCKS_PER_SEQ),
        block_size=BLOCK_SIZE,
    )
    return partial(seconds, partial(backend.draft, batch, greedy(num_seqs), num_layers))
