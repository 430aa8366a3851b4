"""The one specification of how a token is chosen from logits, and its reference in numpy.

Every backend follows it exactly: from the same logits, the same tokens.  Each row of logits is treated alone, as

    choose(logits: float32 [vocab_size]) -> token id

by these steps, in this order.  Arithmetic is IEEE 754 in the stated format, every operation rounded on its own (no
fused multiply-add); float32 parameters widen exactly where float64 is stated.

1. Penalties, float32.  A token that stands in the prompt or was generated has its logit divided by
   `repetition_penalty` if the logit is positive, else multiplied by it (Keskar et al. 2019).  Then, for a generated
   token, logit = (logit - frequency_penalty * count) - presence_penalty, where count is how often it was generated.
2. Biases, float32.  Each `addend` of the row is added to its token's logit, in the order of the entries; -inf bans it.
3. Mask.  Where the row has one, -inf is added to the logit of each token whose bit in it is 0.
4. Validity.  If the greatest logit is not finite (NaN or +inf anywhere, or every token banned), the row has no answer
   and yields -1.
5. A row with a `forced_token_id` yields it.
6. A row with temperature 0 yields the token with the greatest logit, the lowest id on ties.

A token whose logit is -inf by now takes no part in the steps that follow.

7. top_n_sigma > 0, float64 (Tang et al. 2024): a token stays if logit >= greatest - top_n_sigma * sigma, where sigma is
   the standard deviation of the n logits that take part:

       mean = total(logit) / n,  sigma = sqrt(total((logit - mean) * (logit - mean)) / n)

   total adds numbers in one order, so that no bit depends on how it is computed: a number stands at the place of its
   token id, zeros stand at all other places up to a power of two, and as long as there is more than one place, the
   second half is added to the first.
8. Temperature, float64: x = logit / temperature.
9. top_k > 0 keeps the k tokens with the greatest x; among equals at the border, the lowest ids: exactly
   min(k, number of tokens) stay.
10. typical_p < 1, float64 (locally typical sampling, Meister et al. 2022): let d = x - x_max and w = exp(d), with the
    greatest x of the kept tokens, and let m be the mean of their d, weighted by w.  So abs(d - m) is how far a
    surprise, -log(p), is from the entropy.  Order the kept tokens by abs(d - m) ascending, then x descending, then id
    ascending.  A token stays while the sum of w before it is below typical_p times the sum of all kept w; the first one
    always stays.
11. top_p < 1, float64 (nucleus sampling, Holtzman et al. 2020): order the kept tokens by x descending, then id
    ascending, and let w = exp(x - x_max), with the greatest x of the kept tokens.  A token stays while the sum of w
    before it is below top_p times the sum of all kept w; the first one always stays.
12. min_p > 0, float64 (Nguyen et al. 2024): a token stays if w >= min_p, with w of step 11.
13. xtc_probability > 0 and xtc_threshold <= 0.5, float64 ("exclude top choices"): if the chance below is less than
    xtc_probability, consider the kept tokens with w >= xtc_threshold times the sum of all kept w, in the order and with
    w of step 11.  All of them but the last one are left out.
14. Gumbel-max: the row yields the kept token with the greatest x + g, the lowest id on ties, where g is the noise
    below.  That is a draw from the softmax of the kept x (Gumbel 1954).

The order is that of llama.cpp's default chain, but for temperature, which comes last there and before all that looks at
probabilities here, as in vLLM and transformers.  So temperature 0 is greedy whatever else is asked for.

The noise is a pure function of a 64-bit seed, the index `position` of the token to be chosen in its sequence, and the
token id.  All integer arithmetic is modulo 2**64, and shifts are logical:

    mix(z):  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
             z = (z ^ (z >> 27)) * 0x94D049BB133111EB
             z ^ (z >> 31)                                  # the finalizer of splitmix64 (Steele et al. 2014)
    key = mix(seed + 0x9E3779B97F4A7C15 * (position + 1))
    h   = mix(key  + 0x9E3779B97F4A7C15 * (token_id + 1))
    u   = ((h >> 12) + 0.5) * 2**-52                        # exact in float64, strictly between 0 and 1
    g   = -log(-log(u))                                     # float64

The chance of step 13 is the u of token id 0 where seed is replaced by seed ^ 0x6A09E667F3BCC909: it depends on seed and
position only, and no noise depends on it.

exp, log and sums are as exact as those of the standard library, and sums may be added in any order, except for `total`:
they decide a choice only where it depends on the last bits of a float64.

Log-probabilities are those of softmax(logits) before step 1, within 1e-5.  A token's rank is 1 + the number
of tokens whose logit is strictly greater; alternatives are ordered by logit descending, then id ascending.  A row with
`logprob_token_ids` has these tokens in place of alternatives, in their order.

A new parameter is spelt in seven files: its step here and in `SAMPLING_ROW`, `model/backends/torch_sampler.py` and
`model/native/sampler.cpp`, which compute it, `scheduler/output.py` (`SamplingParams`), the two ends of the wire,
`server/wire/requests.py` and `clients/types.py`, and what is said of it, `server/openapi/fields.py`.  The code between
these files copies fields by their names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import Float32, Records, SamplerOutput, SamplingBatch
from shoal.model.step.noise import Float64, Int64, chances, gumbel_noise
from shoal.model.step.reference import describe, keep_typical, within_share, within_sigmas
from shoal.scheduler.output import SamplingParams

# How to choose at one row of logits.  All fields but three have the names and meanings of those of `SamplingParams`,
# with -1 for None.  `position` is the index in the sequence of the token to be chosen.  `forced_token_id` is -1, or a
# known token that is only scored.  `mask` is the number of the row's mask in `SamplingBatch.masks`, or -1.  Behind the
# `logprob_token_ids`, which `num_logprobs` counts, stands -1.
MAX_NAMED_TOKENS = 20
SAMPLING_ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("position", np.int64),
        ("forced_token_id", np.int32),
        ("mask", np.int32),
        ("num_logprobs", np.int32),
        ("logprob_token_ids", np.int32, MAX_NAMED_TOKENS),
        ("temperature", np.float32),
        ("top_n_sigma", np.float32),
        ("top_k", np.int32),
        ("typical_p", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("xtc_probability", np.float32),
        ("xtc_threshold", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("repetition_penalty", np.float32),
    ],
    align=True,
)


def sampling_row(params: SamplingParams) -> tuple[Any, ...]:
    """The values of a request's SAMPLING_ROW, with position 0, no forced token and no mask."""
    others: dict[str, Any] = {"position": 0, "forced_token_id": -1, "mask": -1}
    if named := params.logprob_token_ids:
        others["num_logprobs"] = len(named)
        others["logprob_token_ids"] = named + (-1,) * (MAX_NAMED_TOKENS - len(named))
    values = [others[name] if name in others else getattr(params, name) for name in SAMPLING_ROW.names or ()]
    return tuple(-1 if value is None else value for value in values)


def sampling_rows(num_rows: int, **fields: Any) -> Records:
    """[num_rows] SAMPLING_ROW with the given fields, each a scalar or [num_rows].

    The other fields have the defaults of `SamplingParams`, and the seed is 0.
    """
    rows = np.empty(num_rows, SAMPLING_ROW)
    rows[:] = sampling_row(SamplingParams(max_tokens=0, seed=0))
    for name, values in fields.items():
        rows[name] = values
    return rows


def penalises_output(params: SamplingParams) -> bool:
    """Whether step 1 depends on the tokens that were generated."""
    return bool(params.presence_penalty or params.frequency_penalty or penalises_prompt(params))


def penalises_prompt(params: SamplingParams) -> bool:
    """Whether step 1 depends on the tokens of the prompt."""
    return params.repetition_penalty != 1


def sample_reference(logits: Float32, sampling: SamplingBatch) -> SamplerOutput:
    """Choose a token at each row of `logits` [num_logits, vocab_size], as this module specifies, row by row."""
    adjusted = _adjusted(logits, sampling)
    token_ids = np.array([_choose(*both) for both in zip(adjusted, sampling.rows, strict=True)], np.int32)
    return describe(token_ids, logits, sampling.rows)


def excludes_top(rows: Records) -> NDArray[np.bool_]:
    """Whether step 13 leaves tokens out at each of the rows."""
    is_due = (rows["xtc_probability"] > 0) & (rows["xtc_threshold"] <= 0.5)
    if is_due.any():
        is_due &= chances(rows["seed"], rows["position"]) < rows["xtc_probability"]
    return is_due


def _adjusted(logits: Float32, sampling: SamplingBatch) -> Float32:
    """Steps 1 to 3."""
    logits = logits.copy()
    penalties, biases = sampling.penalties, sampling.biases
    at, rows, counts = (penalties["row"], penalties["token_id"]), sampling.rows[penalties["row"]], penalties["count"]
    values = logits[at]
    values = np.where(values > 0, values / rows["repetition_penalty"], values * rows["repetition_penalty"])
    penalised = values - rows["frequency_penalty"] * counts.astype(np.float32) - rows["presence_penalty"]
    logits[at] = np.where(counts > 0, penalised, values)
    np.add.at(logits, (biases["row"], biases["token_id"]), biases["addend"])
    if sampling.masks is not None:
        logits += sampling.masks.addends(sampling.rows["mask"], logits.shape[1])
    return logits


def probabilities(logits: Float32, sampling: SamplingBatch) -> Float64:
    """The distribution over all tokens, [num_logits, vocab_size], that each row of `logits` is a draw from.

    It is zero at rows that have no answer.
    """
    result = np.zeros(logits.shape, np.float64)
    adjusted = _adjusted(logits, sampling)
    for distribution, values, row in zip(result, adjusted, sampling.rows, strict=True):
        kept, x = _kept(values, row)
        weights = np.exp(x - x.max(initial=-np.inf))
        distribution[kept] = weights / weights.sum()
    return result


def _choose(logits: Float32, row: np.void) -> int:
    """Steps 4 to 14 for one row of adjusted logits."""
    kept, x = _kept(logits, row)
    if len(kept) < 2:  # there is nothing to draw
        return int(kept.max(initial=-1))
    noise = gumbel_noise(int(row["seed"]), int(row["position"]), len(logits))
    return int(kept[(x + noise[kept]).argmax()])


def _kept(logits: Float32, row: np.void) -> tuple[Int64, Float64]:
    """Steps 4 to 13: the ids that may be chosen, ascending, and the x of each; none where the row has no answer."""
    if not np.isfinite(logits.max()):
        return np.empty(0, np.int64), np.empty(0)
    if row["forced_token_id"] >= 0:
        return np.array([row["forced_token_id"]], np.int64), np.zeros(1)
    if row["temperature"] == 0:
        return np.array([logits.argmax()]), np.zeros(1)
    if row["top_n_sigma"] > 0:
        logits = within_sigmas(logits, float(row["top_n_sigma"]))
    x = logits.astype(np.float64) / np.float64(row["temperature"])
    order = np.argsort(-x, kind="stable")[: np.isfinite(x).sum()]
    if row["top_k"] > 0:
        order = order[: row["top_k"]]
    if row["typical_p"] < 1:
        order = keep_typical(order, x, float(row["typical_p"]))
    weights = np.exp(x[order] - x[order[0]])
    keep = np.ones(len(order), np.bool_)
    if row["top_p"] < 1:
        keep = within_share(weights, float(row["top_p"]))
    if row["min_p"] > 0:
        keep &= weights >= float(row["min_p"])
    if excludes_top(np.array([row], SAMPLING_ROW))[0]:
        order, weights = order[keep], weights[keep]
        num_top = np.count_nonzero(weights >= float(row["xtc_threshold"]) * weights.sum())
        keep = np.arange(len(order)) >= num_top - 1
    kept = np.sort(order[keep])
    return kept, x[kept]
