"""`shoal plan`: what a model costs on a machine, in tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.model.record import ModelRecord
from shoal.server.inspection import cache_as, in_ranges, sort_arrays
from shoal.server.planner import formulas
from shoal.server.planner.costs import Costs, Split, Step, most_ranks
from shoal.server.planner.machines import Machine
from shoal.server.planner.paying import ACCEPTANCE, NUM_SPEC_TOKENS, powers, verifying, where_it_pays
from shoal.server.planner.subject import Subject
from shoal.terminal import in_words

Row = dict[str, Any]

_USUAL_RANKS = (2, 4, 8)
_UNITS = {"bytes": "B", "flops": "FLOP"}


@dataclass(frozen=True)
class Plan:
    """All that `shoal plan` says; rows hold bytes, FLOPs and seconds under names that end with these words.

    Attributes:
        facts: of the model on the machine.
        parts, layers: parameters, and the FLOPs of one token after `context` others.
        cache: of a token, as the model has it and with other attention of the same width.
        steps: the roofline: the least time of steps.
        fit: how many requests of a length fit beside the weights.
        speculation: what verifying drafted tokens costs, in plain steps, and from which acceptance rate on it pays.
        splits: a decode step of the largest batch on several ranks.
        pays: up to where something pays.
        training: bytes on one rank, and on each of several.
        measured: steps of the engine beside their bounds; empty if nothing was measured.
    """

    model: str
    machine: Machine
    context: int
    batch: int
    facts: Row
    parts: Sequence[Row]
    layers: Sequence[Row]
    cache: Sequence[Row]
    steps: Sequence[Row]
    fit: Sequence[Row]
    speculation: Sequence[Row]
    splits: Sequence[Row]
    pays: dict[str, str]
    training: Sequence[Row]
    measured: Sequence[Row]

    def as_json(self) -> Row:
        return asdict(self)

    def tables(self) -> Iterator[tuple[str, Sequence[Mapping[str, object]]]]:
        """Titles and rows for people."""
        facts = _words(self.facts)
        yield f"{self.model} on {self.machine.name}", [{"what": name, "": value} for name, value in facts.items()]
        for title, rows in (
            (f"Parts: FLOPs of one token after {self.context:,} others", self.parts),
            ("Layers", self.layers),
            (f"KV cache of a token, and requests of {self.context:,} tokens that fit", self.cache),
            ("Roofline: the least time of a step", self.steps),
            ("Requests that fit beside the weights, by their length", self.fit),
            (
                f"Speculation: {NUM_SPEC_TOKENS} drafted tokens for each sequence, of which {ACCEPTANCE} are right",
                self.speculation,
            ),
            (f"Splitting: decode, {self.batch} sequences after {self.context:,} tokens", self.splits),
        ):
            if rows:
                yield title, list(map(_words, rows))
        yield "Where it pays", [{"what": what, "pays": words} for what, words in self.pays.items()]
        yield f"Training, {self.context:,} tokens on a rank", list(map(_words, self.training))
        if self.measured:
            yield "Measured beside the bound", list(map(_words, self.measured))


def _words(row: Row) -> Row:
    return dict(_cell(name, value) for name, value in row.items())


def _cell(name: str, value: Any) -> tuple[str, object]:
    """The title and the text of a cell; the last word of the name says what the number is."""
    words = name.split("_")
    title = " ".join(words).removesuffix(" bytes").removesuffix(" flops").removeprefix("num ")
    if words[-1] == "seconds":
        return " ".join([*words[:-1], "ms"]), None if value is None else float(value) * 1e3
    if title == "share":
        return title, f"{100 * value:.1f} %"
    if value is not None and (words[-1] in _UNITS or words[0] == "num"):
        return title, in_words(value, _UNITS.get(words[-1], ""))
    return title, value


def make_plan(
    model: str, subject: Subject, *, batch: int, asked: Split, timed: Sequence[tuple[Step, float]] = ()
) -> Plan:
    """The plan of a model on a machine.

    Args:
        batch: the most sequences of a step.
        asked: ranks; where it asks for none, the usual numbers of them.
        timed: steps of the engine, with their seconds.
    """
    costs, machine, context = subject.costs, subject.machine, subject.context
    splits = [*_splits(costs, asked)]
    return Plan(
        model=model,
        machine=machine,
        context=context,
        batch=batch,
        facts=_facts(costs, machine, context),
        parts=[*_parts(subject.record, costs, context)],
        layers=[*_layers(costs)],
        cache=[*_cache(costs, machine, context)],
        steps=[*_steps(costs, machine, context, batch)],
        fit=[*_fit(costs, machine)],
        speculation=[verifying(costs, machine, context, num_seqs) for num_seqs in powers(4, batch)],
        splits=[_split(costs, machine, context, batch, split) for split in splits],
        pays=where_it_pays(costs, machine, context, batch),
        training=[*_training(costs, context, asked.ranks if asked.ranks > 1 else _USUAL_RANKS[-1])],
        measured=[_beside(costs, machine, *own) for own in timed],
    )


def _facts(costs: Costs, machine: Machine, context: int) -> Row:
    rate = machine.flops[costs.dtype]
    return {
        "num_parameters": costs.num_parameters,
        "num_weights_of_one_token": costs.num_active,
        "numbers": f"{costs.dtype}, {costs.weight_bytes_each:.3g} bytes a weight",
        "weights_bytes": costs.weight_bytes,
        "memory_bytes": machine.memory,
        "computed_in_a_second_flops": rate,
        "read_in_a_second_bytes": machine.bandwidth,
        "ridge_flops_per_byte": formulas.ridge(rate, machine.bandwidth),
        "training_step_flops": formulas.training_flops(costs.num_active, context),
    }


def _parts(record: ModelRecord, costs: Costs, context: int) -> Iterator[Row]:
    totals, active = Counter[str](), dict[str, float]()
    for part, _, _, array, share in sort_arrays(record):
        totals[part] += array.size
        active[part] = active.get(part, 0.0) + (array.size * share if array.ndim > 1 else 0)
    step = Step.decode(1, context)
    flops = {part: formulas.matrix_flops(weights, 1) for part, weights in active.items()}
    flops |= {"scores and sums of attention": costs.attention_flops(step), "all": costs.flops(step)}
    totals["all"] = costs.num_parameters
    for part, own in flops.items():
        share = totals[part] / costs.num_parameters
        yield {"part": part, "num_parameters": totals[part], "share": share, "flops": own}


def _layers(costs: Costs) -> Iterator[Row]:
    for kind in dict.fromkeys(costs.layers):
        indices = [index for index, layer in enumerate(costs.layers) if layer == kind]
        yield {
            "layers": in_ranges(indices),
            "num_parameters": kind.num_parameters,
            "num_in_experts": kind.num_expert_parameters,
            "one_token_flops": formulas.matrix_flops(kind.num_active, 1),
            "all_of_them_flops": formulas.matrix_flops(kind.num_active, len(indices)),
        }


def _cache(costs: Costs, machine: Machine, context: int) -> Iterator[Row]:
    kinds = cache_as(costs.config)
    for kind, num_elements in kinds.items():
        ratio = num_elements / kinds["this model"]
        yield {
            "attention": kind,
            "bytes": num_elements * costs.bytes_each,
            "of_this": ratio,
            "requests": costs.num_fitting(machine, ratio * costs.cache_bytes(context)),
        }


def _fit(costs: Costs, machine: Machine) -> Iterator[Row]:
    longest = costs.config.max_position_embeddings
    for length in (*(n for n in powers(4, longest) if 64 <= n < longest), longest):
        size = costs.cache_bytes(length)
        yield {"length": length, "cache_bytes": size, "requests": costs.num_fitting(machine, size)}


def _steps(costs: Costs, machine: Machine, context: int, batch: int) -> Iterator[Row]:
    yield _row("prefill", costs, machine, Step.prefill(context))
    for length in dict.fromkeys((max(context // 8, 1), context)):
        for num_seqs in powers(4, batch):
            yield _row("decode", costs, machine, Step.decode(num_seqs, length))


def _row(name: str, costs: Costs, machine: Machine, step: Step) -> Row:
    flops, num_bytes, seconds = costs.flops(step), costs.bytes_read(step), costs.seconds(step, machine)
    return {
        "step": name,
        "sequences": step.num_seqs,
        "length": step.length,
        "flops": flops,
        "bytes": num_bytes,
        "flops_per_byte": flops / num_bytes,
        "limit": "reading" if costs.is_read(step, machine) else "computing",
        "seconds": seconds,
        "tokens_per_second": step.num_seqs * step.num_tokens / seconds,
    }


def _beside(costs: Costs, machine: Machine, step: Step, seconds: float) -> Row:
    """What was measured of a step, beside its bound."""
    bound = costs.seconds(step, machine)
    return {
        "step": "prefill" if step.num_tokens > 1 else "decode",
        "sequences": step.num_seqs,
        "length": step.length,
        "bound_seconds": bound,
        "measured_seconds": seconds,
        "tokens_per_second": step.num_seqs * step.num_tokens / seconds,
        "of_the_bound": bound / seconds,
    }


def _splits(costs: Costs, asked: Split) -> Iterator[Split]:
    """Each way alone, then those that were asked for together."""
    given = {way: ranks for way, ranks in asdict(asked).items() if ranks > 1}
    for way, most in most_ranks(costs).items():
        for ranks in (given[way],) if way in given else () if given else _USUAL_RANKS:
            if ranks <= most:
                yield Split(**{way: ranks})
    if len(given) > 1:
        yield asked


def _split(costs: Costs, machine: Machine, context: int, batch: int, split: Split) -> Row:
    step = Step.decode(batch, context)
    row: Row = {
        "ranks": ", ".join(f"{way} {ranks}" for way, ranks in asdict(split).items() if ranks > 1),
        "weights_of_each_bytes": split.weight_bytes(costs),
        "sent_by_each_bytes": split.wire_bytes(costs, batch),
        "for_the_same_bits_bytes": split.gathered_bytes(costs, batch, batch),
    }
    if machine.link:
        seconds, sending = split.seconds(costs, step, machine)
        row |= {"seconds": seconds, "on_the_wire_seconds": sending, "tokens_per_second": batch / seconds}
        row["times_as_fast"] = costs.seconds(step, machine) / seconds
    return row


def _training(costs: Costs, context: int, shards: int) -> Iterator[Row]:
    config, num = costs.config, costs.num_parameters
    alone, sharded = formulas.training_state_bytes(num), formulas.training_state_bytes(num, shards)
    many = f"each_of_{shards}_ranks_bytes"
    for what, size in alone.items():
        yield {"what": what, "one_rank_bytes": size, many: sharded[what]}
    shape = config.hidden_size, config.num_heads, config.num_layers
    kept = formulas.activation_bytes(context, context, *shape)
    again = formulas.recomputed_activation_bytes(context, config.hidden_size, config.num_layers)
    yield {"what": "activations, all kept", "one_rank_bytes": kept, many: kept}
    yield {"what": "activations, computed again", "one_rank_bytes": again, many: again}
    total, total_sharded = sum(alone.values()) + again, sum(sharded.values()) + again
    yield {"what": "all, activations computed again", "one_rank_bytes": total, many: total_sharded}
    yield {"what": "sent in a step", "one_rank_bytes": 0, many: formulas.fsdp_bytes(num, shards)}
