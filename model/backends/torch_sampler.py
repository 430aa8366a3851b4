"""Chooses tokens with torch, on the device of the logits, exactly as `model/step/sampling.py` specifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shoal.model.step.batch import Int32, Records, SamplerOutput, SamplingBatch
from shoal.model.step.noise import GOLDEN_GAMMA, MIX_MULTIPLIER_1, MIX_MULTIPLIER_2, noise_keys
from shoal.model.step.sampling import excludes_top

# Upper limit on the elements of a [rows, vocab_size] temporary, so that it fits into a CPU's caches, or takes a small
# part of a GPU's memory.  Further rows are drawn in the next turn.
_MAX_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}
# For top_p this many of the most probable tokens are tried before the whole vocabulary is sorted.
_NARROW = 128


def sample(logits: Tensor, sampling: SamplingBatch) -> SamplerOutput:
    """Choose a token at each row of `logits` [num_logits, vocab_size] float32."""
    adjusted = _adjusted(logits, sampling)
    greatest, greedy = adjusted.max(dim=-1)
    token_ids = greedy.to(torch.int32).cpu().numpy()
    forced = sampling.rows["forced_token_id"]
    rows_at_once = max(1, _MAX_ELEMENTS[logits.device.type] // logits.shape[1])
    for draw, group in _groups(sampling.rows):
        for start in range(0, len(group), rows_at_once):
            turn = group[start : start + rows_at_once]
            rows = sampling.rows[turn]
            stays = _within_sigmas(adjusted[_index(turn, logits.device)], rows)
            token_ids[turn] = draw(stays, _Draws.of(rows, logits.device)).cpu().numpy()
    token_ids = np.where(forced >= 0, forced, token_ids)
    token_ids = np.where(torch.isfinite(greatest).cpu().numpy(), token_ids, np.int32(-1))
    asked = np.flatnonzero(sampling.rows["num_logprobs"] >= 0)
    return _with_logprobs(token_ids, logits, asked, sampling.rows[asked]) if asked.size else SamplerOutput(token_ids)


def _adjusted(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """Steps 1 to 3; `logits` itself where no row has a penalty, a bias or a mask."""
    penalties, biases, device = sampling.penalties, sampling.biases, logits.device
    if not penalties.size and not biases.size and sampling.masks is None:
        return logits
    logits = logits.clone()
    if penalties.size:
        at = (_index(penalties["row"], device), _index(penalties["token_id"], device))
        rows = sampling.rows[penalties["row"]]
        repetition, frequency, presence = (
            _column(rows[name], device) for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        )
        counts = _column(penalties["count"], device)
        values = logits[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[at] = torch.where(counts > 0, values - frequency * counts.float() - presence, values)
    if biases.size:
        at = (_index(biases["row"], device), _index(biases["token_id"], device))
        logits.index_put_(at, _column(biases["addend"], device), accumulate=True)
    if sampling.masks is not None:
        logits += _column(sampling.masks.addends(sampling.rows["mask"], logits.shape[1]), device)
    return logits


def _column(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)


def _index(array: Int32 | NDArray[np.intp], device: torch.device) -> Tensor:
    return _column(array.astype(np.int64), device)


@dataclass(frozen=True, slots=True)
class _Draws:
    """The parameters of the rows to draw: `keys` [n, 1] int64; the others [n, 1] float64.

    `xtc_threshold` is inf where no token is to be left out.
    """

    keys: Tensor
    temperature: Tensor
    top_k: Tensor
    typical_p: Tensor
    top_p: Tensor
    min_p: Tensor
    xtc_threshold: Tensor

    @classmethod
    def of(cls, rows: Records, device: torch.device) -> _Draws:
        columns: list[NDArray[Any]] = [noise_keys(rows["seed"], rows["position"]).view(np.int64)]
        columns += [rows[name].astype(np.float64) for name in ("temperature", "top_k", "typical_p", "top_p", "min_p")]
        columns.append(np.where(excludes_top(rows), rows["xtc_threshold"].astype(np.float64), np.inf))
        return cls(*(_column(column, device)[:, None] for column in columns))

    def __getitem__(self, which: Tensor) -> _Draws:
        """The draws where `which` [n] is true."""
        return _Draws(*(getattr(self, field.name)[which] for field in fields(self)))


def _groups(rows: Records) -> list[tuple[Callable[[Tensor, _Draws], Tensor], NDArray[np.intp]]]:
    """The rows to draw, grouped by the function that draws them: by steps 8 to 14, token ids [n] int32."""
    drawn = np.flatnonzero((rows["temperature"] > 0) & (rows["forced_token_id"] < 0))
    if not drawn.size:
        return []
    rows = rows[drawn]
    is_stepwise = (rows["typical_p"] < 1) | excludes_top(rows)
    is_narrow = ~is_stepwise & ((rows["top_k"] > 0) | (rows["top_p"] < 1))
    return [
        (_draw_from_all, drawn[~is_stepwise & ~is_narrow]),
        (_draw_from_best, drawn[is_narrow]),
        (_draw_stepwise, drawn[is_stepwise]),
    ]


def _within_sigmas(logits: Tensor, rows: Records) -> Tensor:
    """Step 7: -inf for what does not stay; `logits` themselves where no row asks."""
    if not (rows["top_n_sigma"] > 0).any():
        return logits
    top_n_sigma = _column(rows["top_n_sigma"].astype(np.float64), logits.device)[:, None]
    takes_part, wide = logits > -torch.inf, logits.double()
    count = takes_part.sum(dim=-1, keepdim=True)
    mean = _total(wide.masked_fill(~takes_part, 0)) / count
    deviations = (wide - mean).masked_fill_(~takes_part, 0)
    variance = (_total(deviations * deviations) / count).cpu().numpy()
    sigma = torch.from_numpy(np.sqrt(variance)).to(logits.device)  # torch's, by MKL, is not exact on every processor
    least = wide.amax(dim=-1, keepdim=True) - top_n_sigma * sigma
    return logits.masked_fill((wide < least) & (top_n_sigma > 0), -torch.inf)


def _total(numbers: Tensor) -> Tensor:
    """The sum of each row in the order of step 7: [n, 1]."""
    num_places = 1 << (numbers.shape[1] - 1).bit_length()
    sums = F.pad(numbers, (0, num_places - numbers.shape[1]))
    while sums.shape[1] > 1:
        first, second = sums.chunk(2, dim=-1)
        sums = first + second
    return sums


def _draw_from_all(logits: Tensor, draws: _Draws) -> Tensor:
    """Draw where only min_p may apply: no sorting is needed."""
    x = logits.double().div_(draws.temperature)
    all_ids = torch.arange(x.shape[1], device=x.device)[None]
    scores = x + _noise(draws.keys, all_ids)
    if (draws.min_p > 0).any():
        weights = (x - x.amax(dim=-1, keepdim=True)).exp_()
        scores.masked_fill_(weights < draws.min_p, -torch.inf)
    return scores.argmax(dim=-1).to(torch.int32)


def _draw_from_best(logits: Tensor, draws: _Draws) -> Tensor:
    """Draw where top_k, top_p and min_p may apply: from the few most probable tokens if no other can be chosen."""
    vocab_size = logits.shape[1]
    width = min(vocab_size, int(torch.where(draws.top_k > 0, draws.top_k, _NARROW).max()))
    token_ids, certain = _draw_among(logits, draws, width)
    if not certain.all():
        token_ids[~certain] = _draw_among(logits[~certain], draws[~certain], vocab_size)[0]
    return token_ids


def _draw_among(logits: Tensor, draws: _Draws, width: int) -> tuple[Tensor, Tensor]:
    """Draw from the `width` most probable tokens: token ids [n], and whether no other could be chosen, [n]."""
    values, ids = _greatest(logits, width)
    x = values.double().div_(draws.temperature)
    in_top_k = (draws.top_k == 0) | (torch.arange(width, device=x.device) < draws.top_k)
    weights = (x - x[:, :1]).exp_().mul_(in_top_k)
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    if width < logits.shape[1]:
        all_weights = (logits.double().div_(draws.temperature) - x[:, :1]).exp_()
        total = torch.where(draws.top_k > 0, total, all_weights.sum(dim=-1, keepdim=True))
    limit = torch.where(draws.top_p < 1, draws.top_p * total, torch.inf)
    keep = in_top_k & (F.pad(sums[:, :-1], (1, 0)) < limit) & (weights >= draws.min_p)
    keep[:, 0] = True
    certain = (draws.top_k > 0) | (sums[:, -1:] >= limit)
    return _winners(x, ids, keep, draws.keys), certain[:, 0]


def _draw_stepwise(logits: Tensor, draws: _Draws) -> Tensor:
    """Draw with all steps, one after the other, over the sorted vocabulary."""
    values, ids = _greatest(logits, logits.shape[1])
    x = values.double().div_(draws.temperature)
    keep = (values > -torch.inf) & ((draws.top_k == 0) | (torch.arange(x.shape[1], device=x.device) < draws.top_k))
    d = (x - x[:, :1]).masked_fill_(~keep, 0)
    weights = d.exp() * keep
    mean = (weights * d).sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True)
    nearest = (d - mean).abs_().masked_fill_(~keep, torch.inf).argsort(dim=-1, stable=True)
    stays = _within_share(weights.gather(-1, nearest), draws.typical_p)
    keep &= torch.zeros_like(keep).scatter_(-1, nearest, stays)
    weights = (x - x.masked_fill(~keep, -torch.inf).amax(dim=-1, keepdim=True)).exp_() * keep
    keep &= _within_share(weights, draws.top_p) & (weights >= draws.min_p)
    is_top = keep & (weights >= draws.xtc_threshold * (weights * keep).sum(dim=-1, keepdim=True))
    keep &= ~is_top | (is_top.cumsum(dim=-1) == is_top.sum(dim=-1, keepdim=True))
    return _winners(x, ids, keep, draws.keys)


def _within_share(weights: Tensor, share: Tensor) -> Tensor:
    """Which tokens, with weights in their order, stay: while the sum before them is below this share of all."""
    sums = weights.cumsum(dim=-1)
    limit = torch.where(share < 1, share * sums[:, -1:], torch.inf)
    sums_before = F.pad(sums[:, :-1], (1, 0))
    return (sums_before < limit) | (sums_before == 0)


def _winners(x: Tensor, ids: Tensor, keep: Tensor, keys: Tensor) -> Tensor:
    """Step 14 among the kept tokens: token ids [n] int32."""
    scores = (x + _noise(keys, ids)).masked_fill_(~keep, -torch.inf)
    winners = scores == scores.amax(dim=-1, keepdim=True)
    return ids.masked_fill(~winners, torch.iinfo(torch.int32).max).amin(dim=-1).to(torch.int32)


def _greatest(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` greatest logits of each row and their ids, ordered by logit descending, then id ascending."""
    if width < logits.shape[1]:
        values, ids = logits.topk(width, dim=-1)
        # topk orders equal logits arbitrarily, so order them here; if it left some equals out, sort all.
        if not width or not ((logits >= values[:, -1:]).sum(dim=-1) > width).any():
            ids = ids.sort(dim=-1).values
            values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
            return values, ids.gather(-1, order)
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :width], ids[:, :width]


def _noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """The noise `g` of token ids [n or 1, m] under keys [n, 1]: float64 [n, m]."""
    hashes = _mix(keys + (token_ids + 1) * _signed(GOLDEN_GAMMA))
    uniform = _shift_right(hashes, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    """In place; int64 products wrap as uint64 ones do."""
    z ^= _shift_right(z, 30)
    z *= _signed(MIX_MULTIPLIER_1)
    z ^= _shift_right(z, 27)
    z *= _signed(MIX_MULTIPLIER_2)
    z ^= _shift_right(z, 31)
    return z


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's own repeats the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """The int64 with the bits of a uint64."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _with_logprobs(token_ids: Int32, logits: Tensor, rows: NDArray[np.intp], asking: Records) -> SamplerOutput:
    """Add log-probabilities at `rows`, as these ask; elsewhere they are 0."""
    asked = logits[_index(rows, logits.device)]
    logprobs = asked.log_softmax(dim=-1)
    chosen = _index(np.maximum(token_ids[rows], 0), logits.device)[:, None]
    top = _greatest(asked, int(asking["num_logprobs"].max()))[1]
    named = asking["logprob_token_ids"][:, : top.shape[1]]
    if (named >= 0).any():
        ids, places = _index(named, logits.device), top[:, : named.shape[1]]
        places.copy_(torch.where(ids >= 0, ids, places))
    return SamplerOutput(
        token_ids=token_ids,
        logprobs=_spread(logprobs.gather(-1, chosen)[:, 0], rows, len(token_ids)),
        ranks=_spread(1 + (asked > asked.gather(-1, chosen)).sum(-1, dtype=torch.int32), rows, len(token_ids)),
        top_token_ids=_spread(top.to(torch.int32), rows, len(token_ids)),
        top_logprobs=_spread(logprobs.gather(-1, top), rows, len(token_ids)),
    )


def _spread(values: Tensor, rows: NDArray[np.intp], num_rows: int) -> NDArray[Any]:
    array = values.cpu().numpy()
    spread = np.zeros((num_rows, *array.shape[1:]), array.dtype)
    spread[rows] = array
    return spread
