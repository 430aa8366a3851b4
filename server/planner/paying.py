"""Where batching, speculation and splitting start or stop to pay, by the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.server.planner import formulas
from shoal.server.planner.costs import Costs, Split, Step, most_ranks
from shoal.server.planner.machines import Machine

NUM_SPEC_TOKENS, ACCEPTANCE = 4, 0.7  # of the speculation that is weighed
_PAYS = 1.1  # twice as much of something pays if it gives at least this times the tokens/s
_MOST_SEQS = 1 << 16
_MOST_RANKS = 64


def verifying(costs: Costs, machine: Machine, context: int, num_seqs: int) -> dict[str, Any]:
    """What verifying drafted tokens costs, in plain steps, and what it gives."""
    plain = costs.seconds(Step.decode(num_seqs, context), machine)
    cost = costs.seconds(Step.decode(num_seqs, context, NUM_SPEC_TOKENS), machine) / plain
    gain = formulas.tokens_per_step(ACCEPTANCE, NUM_SPEC_TOKENS) / cost
    return {
        "sequences": num_seqs,
        "plain_steps": cost,
        "pays_from_acceptance": formulas.least_acceptance(cost, NUM_SPEC_TOKENS),
        "times_as_fast": gain,
    }


def where_it_pays(costs: Costs, machine: Machine, context: int, batch: int) -> dict[str, str]:
    """Where something stops to pay; powers of two are tried."""

    def decode_rate(num_seqs: int) -> float:
        return num_seqs / costs.seconds(Step.decode(num_seqs, context), machine)

    sizes = powers(2, _MOST_SEQS)
    batching = next((n for n in sizes if decode_rate(2 * n) < _PAYS * decode_rate(n)), None)
    computing = next((n for n in sizes if not costs.is_read(Step.decode(n, context), machine)), None)
    drafting = [n for n in sizes if verifying(costs, machine, context, n)["times_as_fast"] > 1]
    num_fitting = costs.num_fitting(machine, costs.cache_bytes(context))
    found = {
        "batching": f"up to {batching or _MOST_SEQS} sequences ({num_fitting} fit); "
        + (f"computing is the limit from {computing} on" if computing else "reading the cache stays the limit"),
        "speculation": _from_to(drafting, sizes),
    }
    if costs.weight_bytes > machine.memory:
        found["one alone"] = f"not at all: the weights take {costs.weight_bytes / machine.memory:.1f} times its memory"
    if not machine.link:
        return found
    names = {"tp": "tensor parallel", "ep": "expert parallel", "pp": "pipeline parallel"}
    for kind, step in (("decode", Step.decode(batch, context)), ("prefill", Step.prefill(context))):
        for way, most in most_ranks(costs).items():
            if most > 1:
                last = _last_paying(costs, machine, step, way, min(most, _MOST_RANKS))
                found[f"{names[way]}, {kind}"] = f"up to {last} ranks" if last > 1 else "not at all, but it makes room"
    return found


def _from_to(paying: Sequence[int], sizes: Sequence[int]) -> str:
    """The batches among `sizes` for which something pays, in words."""
    if not paying:
        return "not at all"
    return f"from a batch of {paying[0]} " + ("on" if paying[-1] == sizes[-1] else f"to {paying[-1]}")


def _last_paying(costs: Costs, machine: Machine, step: Step, way: str, most: int) -> int:
    ranks = powers(2, most)
    times = [Split(**{way: n}).seconds(costs, step, machine)[0] for n in ranks]
    return next((n for n, one, two in zip(ranks, times, times[1:], strict=False) if one < _PAYS * two), ranks[-1])


def powers(base: int, most: int) -> list[int]:
    """1, base, base squared, ..., up to `most`."""
    powers = [1]
    while powers[-1] * base <= most:
        powers.append(powers[-1] * base)
    return powers
