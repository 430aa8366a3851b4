"""Parts of the reference in `sampling.py` that are functions of arrays, and know no requests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import Float32, Int32, Records, SamplerOutput
from shoal.model.step.noise import Float64, Int64


def within_sigmas(logits: Float32, count: float) -> Float32:
    """Step 7: -inf for what does not stay."""
    takes_part, wide = logits > -np.inf, logits.astype(np.float64)
    num_tokens = np.count_nonzero(takes_part)
    mean = _total(np.where(takes_part, wide, 0)) / num_tokens
    deviations = np.where(takes_part, wide - mean, 0)
    sigma = np.sqrt(_total(deviations * deviations) / num_tokens)
    return np.where(wide >= wide.max() - count * sigma, logits, np.float32(-np.inf))


def _total(numbers: Float64) -> np.float64:
    """The sum in the order of step 7."""
    sums = np.pad(numbers, (0, (1 << (len(numbers) - 1).bit_length()) - len(numbers)))
    while len(sums) > 1:
        half = len(sums) // 2
        sums = sums[:half] + sums[half:]
    return np.float64(sums[0])


def keep_typical(order: Int64, x: Float64, share: float) -> Int64:
    """Step 10: which of the ordered tokens stay, in the same order."""
    d = x[order] - x[order[0]]
    weights = np.exp(d)
    mean = (weights * d).sum() / weights.sum()
    nearest = np.argsort(abs(d - mean), kind="stable")
    return order[np.sort(nearest[within_share(weights[nearest], share)])]


def within_share(weights: Float64, share: float) -> NDArray[np.bool_]:
    """Which tokens, with weights in their order, stay: while the sum before them is below this share of all."""
    sums = np.cumsum(weights)
    keep = np.ones(len(weights), np.bool_)
    keep[1:] = sums[:-1] < share * sums[-1]
    return keep


def describe(token_ids: Int32, logits: Float32, rows: Records) -> SamplerOutput:
    """The output for tokens that were chosen at the rows of `logits`, with log-probabilities if any row asks."""
    num_top = int(rows["num_logprobs"].max(initial=-1))
    if num_top < 0:
        return SamplerOutput(token_ids)
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # NaN and inf stay within their rows
        shifted = wide - wide.max(axis=-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = np.maximum(token_ids, 0)[:, None]  # a row without an answer has no meaningful log-probabilities
    top = np.argsort(-logits, axis=-1, kind="stable")[:, :num_top]
    named = rows["logprob_token_ids"][:, : top.shape[1]]
    np.copyto(top[:, : named.shape[1]], named, where=named >= 0)
    return SamplerOutput(
        token_ids=token_ids,
        logprobs=np.take_along_axis(logprobs, chosen, axis=-1)[:, 0].astype(np.float32),
        ranks=(1 + (logits > np.take_along_axis(logits, chosen, axis=-1)).sum(axis=-1)).astype(np.int32),
        top_token_ids=top.astype(np.int32),
        top_logprobs=np.take_along_axis(logprobs, top, axis=-1).astype(np.float32),
    )
