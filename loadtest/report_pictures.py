"""Which pictures a report has, and what their captions say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoal.loadtest.metrics import Group, Summary
from shoal.loadtest.plots import batch, comparison, twin
from shoal.loadtest.plots.style import Picture, render
from shoal.loadtest.records import Load
from shoal.loadtest.report_data import Cell, baseline, by_load, in_order, load_name, main_cells
from shoal.loadtest.steps import Step
from shoal.loadtest.timeline import window

Reader = Callable[[Summary], Mapping[Any, Group]]
GROUPINGS: dict[str, Reader] = {
    "client": lambda summary: summary.clients,
    "priority": lambda summary: summary.priorities,
}
MAX_GROUPS = 8  # more are neither picture nor table


def of_section(name: str, cells: Sequence[Cell]) -> Iterator[Picture]:
    """The pictures of one section, as far as there is something to draw.

    Args:
        name: what the names of the pictures begin with.
        cells: of this section, under all loads.
    """
    main = main_cells(cells)
    load = load_name(main[0].load)
    yield Picture(
        f"{name}-throughput",
        f"Throughput and goodput, {load}",
        "The work is the same for all, so that a longer bar is an earlier end. Lines span the least and the most of "
        "the repetitions: what differs by less than they span does not differ.",
        render(comparison.throughput(main)),
    )
    if any(cell.measured.median.ttft for cell in main):
        yield Picture(
            f"{name}-latencies",
            f"Distributions of latency, {load}",
            "Further left is faster; the steps of a staircase are batches that start together. Where a line meets 0.5 "
            "is the median, its upper end is the tail. One run of each setup; the axis is logarithmic.",
            render(comparison.distributions(main)),
        )
    for i, curve in enumerate(curves(cells)):
        yield Picture(
            f"{name}-load-{i + 1}",
            f"Latency against load, from {load_name(curve[0].load)} to {load_name(curve[-1].load)}",
            "Each line is flat while the server keeps up, and rises where it is saturated: the further right, the more "
            "load it carries. Bands span the repetitions.",
            render(comparison.curves(curve)),
        )
    if traced := [cell for cell in main if has_steps(cell)]:
        yield from _of_engine(name, load, traced)
    for i, (grouping, own, read) in enumerate(groupings(cells)):
        yield Picture(
            f"{name}-{grouping}-{i + 1}",
            f"Each {grouping} apart, {load_name(own[0].load)}",
            "Filled: the median; open: p99. A policy that tells them apart moves one line away from the others of its "
            "group; one that does not gives all the same.",
            render(comparison.groups(own, read)),
        )


def _of_engine(name: str, load: str, cells: Sequence[Cell]) -> Iterator[Picture]:
    shown = one_of_each_policy(cells)
    span = window((baseline(shown) or shown[0]).run)
    yield Picture(
        f"{name}-timeline",
        f"The batch, row by row, {load}",
        "Each bar is a request in its row, from when it joined to when it left. White is a row in which nothing was "
        "computed, hatched one that was computed for a request that had ended: with a static batch both grow until its "
        "longest request ends, with continuous batching the next request joins in the step after.",
        render(batch.timeline(shown, span)),
    )
    yield Picture(
        f"{name}-batch",
        f"Batch size and KV cache over time, {load}",
        "Left: rows that work, and padding rows on top of them; beside it, for which share of the time there were so "
        "many. Right: the pale area is the share of the KV cache that requests own, the line what they have filled of "
        "it; the gap between is waste.",
        render(batch.occupancy(shown)),
    )


def step_cost(cells: Sequence[Cell], predict: Callable[[Step], float] | None) -> Picture | None:
    """What a step costs, from all setups without speculation of the workload that comes first."""
    plain = [cell for cell in cells if cell.setup.speculation == "off" and has_steps(cell)]
    if not plain:
        return None
    return Picture(
        "step-cost",
        f"What a step costs, {plain[0].section}",
        "A step with one row takes nearly as long as one with several: the more rows, the cheaper each of them. "
        "The flatter the curve on the left, the more a full batch gains over one that has emptied: this is what "
        "continuous batching has over a static batch without padding rows.",
        render(batch.step_cost(plain, predict)),
    )


def twin_errors(cells: Sequence[Cell]) -> Picture | None:
    """How well the twin predicts."""
    predicted = [cell for cell in cells if cell.predicted is not None]
    if not predicted:
        return None
    return Picture(
        "twin",
        "Errors of the digital twin",
        "Each mark is one setup under one load; on the green band the prediction is as good as it should be. Above "
        "zero the twin predicts more than was measured. Triangles at the edge are further off than the axis reaches.",
        render(twin.errors(predicted)),
    )


def curves(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells that form curves, in the order of their loads: of loads that differ in users only, or in rate only."""
    kinds: dict[Load, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.load.users, cell.load.rate)):
        kind = replace(cell.load, users=0) if cell.load.users else replace(cell.load, rate=math.inf)
        kinds.setdefault(kind, []).append(cell)
    return [own for own in kinds.values() if len(by_load(own)) > 1]


def groupings(cells: Sequence[Cell]) -> list[tuple[str, list[Cell], Reader]]:
    """By what requests can be told apart: its name, the cells of one load, and where their figures are."""
    return [
        (name, own, read)
        for _, own in in_order(cells)
        for name, read in GROUPINGS.items()
        if 1 < max(len(read(cell.measured.median)) for cell in own) <= MAX_GROUPS
    ]


def has_steps(cell: Cell) -> bool:
    """Whether there is a trace with anything in it."""
    return cell.measured.median.engine is not None and any(step.rows for step in cell.run.steps)


def one_of_each_policy(cells: Sequence[Cell]) -> list[Cell]:
    """Without speculation where there is such a cell."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.setup.policy not in found or cell.setup.speculation == "off":
            found[cell.setup.policy] = cell
    return list(found.values())
