"""Verification by rejection sampling: Leviathan et al. 2022, Chen et al. 2023.

A drafted token x that was drawn from q is accepted with probability min(1, p(x) / q(x)), where p is the target's
distribution.  The first rejected token is replaced by a draw from max(p - q, 0), normalized.  If all are accepted, the
target adds a draw from p, the bonus token.  The result has the target's distribution, but is not the sample that the
target draws without speculation.  Rejection sampling accepts more tokens than the comparison of two choices does.

The three draws at a position must be independent of each other, and repeatable.  So each has its own noise: the
specified one (`model/step/sampling.py`) under another seed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shoal.model.speculation.proposer import Float64, Proposal
from shoal.model.step.batch import SamplingBatch
from shoal.model.step.noise import gumbel_noise
from shoal.model.step.sampling import excludes_top

_DRAFT_NOISE = np.uint64(0xD1B54A32D192ED03)
_ACCEPTANCE_NOISE = 0x8CB92BA72F3D8DD7
_REPLACEMENT_NOISE = 0xABC98388FB8FAC03


def with_draft_noise(sampling: SamplingBatch) -> SamplingBatch:
    """Return how drafting chooses: with a noise that is independent of the noises of verification.

    Where the target leaves out top choices by chance, drafting does too.
    """
    rows = sampling.rows.copy()
    rows["xtc_probability"] = excludes_top(rows)
    rows["seed"] ^= _DRAFT_NOISE
    return replace(sampling, rows=rows)


def verify(proposal: Proposal, target: Float64, chosen: list[int], seed: int, position: int) -> list[int]:
    """Return the accepted tokens, and the token that the target adds.

    Args:
        proposal: the drafted tokens that the step computed.
        target: [num_tokens + 1, vocab_size], the target's distribution at each position; a row of zeros where it has
            no finite logits.
        chosen: the target's own draw at each of those positions; -1 where it has no finite logits.
        seed: seed of the request.
        position: position of the first drafted token in its sequence.
    """
    for index, token_id in enumerate(proposal.token_ids):
        if chosen[index] < 0:
            return [*proposal.token_ids[:index], chosen[index]]
        p = target[index]
        q = _certain(token_id, len(p)) if proposal.probabilities is None else proposal.probabilities[index]
        if _uniform(seed, position + index) * q[token_id] >= p[token_id]:
            return [*proposal.token_ids[:index], _replacement(np.maximum(p - q, 0.0), seed, position + index)]
    return [*proposal.token_ids, chosen[len(proposal.token_ids)]]


def _certain(token_id: int, vocab_size: int) -> Float64:
    """Return the distribution of a drafted token that was not drawn."""
    q = np.zeros(vocab_size, np.float64)
    q[token_id] = 1.0
    return q


def _uniform(seed: int, position: int) -> float:
    """Return the number between 0 and 1 from which the noise of token 0 is made."""
    noise = gumbel_noise(seed ^ _ACCEPTANCE_NOISE, position, 1)[0]
    return float(np.exp(-np.exp(-noise)))


def _replacement(weights: Float64, seed: int, position: int) -> int:
    """Draw a token in proportion to the weights, by Gumbel-max."""
    kept = np.flatnonzero(weights)
    noise = gumbel_noise(seed ^ _REPLACEMENT_NOISE, position, len(weights))
    return int(kept[(np.log(weights[kept]) + noise[kept]).argmax()])
