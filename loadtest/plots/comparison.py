"""Pictures of what users saw: throughput, distributions of latency, latency against load, clients apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shoal.loadtest.figures import group_name
from shoal.loadtest.metrics import Group, Quantiles, Summary, e2e, is_answered, itl, ttft
from shoal.loadtest.plots import style
from shoal.loadtest.records import Run
from shoal.loadtest.report_data import Cell, by_load

MAX_POINTS = 400  # of a curve, more than can be seen


def throughput(cells: Sequence[Cell]) -> Figure:
    """Throughput and goodput of each setup, with their range over repetitions."""
    with style.canvas(0.9 + 0.34 * len(cells)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _ranges(left, cells, lambda summary: summary.throughput, "Throughput [output tokens/s]")
        _ranges(right, cells, lambda summary: summary.goodput, "Goodput [requests/s]")
        left.set_yticks(range(len(cells)), [cell.setup.name for cell in cells])
        left.invert_yaxis()
        return figure


def _ranges(axes: Axes, cells: Sequence[Cell], read: Callable[[Summary], float], label: str) -> None:
    values = [read(cell.measured.median) for cell in cells]
    for place, (cell, value) in enumerate(zip(cells, values, strict=True)):
        least, most = read(cell.measured.least), read(cell.measured.most)
        axes.barh(place, value, height=0.62, color=style.colour(cell.setup), alpha=0.85)
        if cell.measured.num_runs > 1:
            axes.plot([least, most], [place, place], color=style.INK, linewidth=1.2, marker="|", markersize=7)
        axes.annotate(
            f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
            (max(most, value), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(0, 1.18 * max([read(cell.measured.most) for cell in cells]) or 1)
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


LATENCIES: tuple[tuple[str, Callable[[Run], Iterable[float | None]]], ...] = (
    ("TTFT", lambda run: map(ttft, filter(is_answered, run.requests))),
    ("ITL", lambda run: (gap for record in run.requests if is_answered(record) for gap in itl(record))),
    ("End-to-end latency", lambda run: map(e2e, filter(is_answered, run.requests))),
)


def distributions(cells: Sequence[Cell]) -> Figure:
    """Cumulative distributions of the latencies in one run of each setup."""
    with style.canvas(3.3) as figure:
        for axes, (name, latencies) in zip(figure.subplots(1, 3, sharey=True), LATENCIES, strict=True):
            for cell in cells:
                _distribution(axes, cell, latencies(cell.run))
            style.log_seconds(axes, "x")
            axes.set(xlabel=name, ylim=(0, 1))
            axes.grid(visible=True)
        figure.axes[0].set_ylabel("share of requests, of gaps for ITL")
        style.legend(figure, [cell.setup for cell in cells])
        return figure


def _distribution(axes: Axes, cell: Cell, latencies: Iterable[float | None]) -> None:
    known = [latency for latency in latencies if latency is not None]
    if not known:
        return
    shares = np.linspace(0, 1, min(len(known), MAX_POINTS) + 1)
    # A latency of nothing has no place on a logarithmic axis: tokens that came in one piece.
    values = np.maximum(np.quantile(known, shares, method="inverted_cdf"), 1e-5)
    axes.step(values, shares, where="pre", color=style.colour(cell.setup), linestyle=style.line_style(cell.setup))


def curves(cells: Sequence[Cell]) -> Figure:
    """Latencies, throughput and goodput against load, for cells of one workload that differ in setup and load only."""
    loads = list(by_load(cells))
    label = "users" if loads[0].users else "requests/s that arrive"
    with style.canvas(7.6) as figure:
        grid = figure.subplots(3, 3, sharex=True)
        for column, (name, read) in enumerate(QUANTILES):
            for row, quantile in enumerate(("p50", "p99")):
                _curve(grid[row][column], cells, _quantile(read, quantile))
                style.log_seconds(grid[row][column], "y")
                grid[row][column].set_title(f"{name}, {quantile}")
        for column, (name, rate) in enumerate(RATES):
            _curve(grid[2][column], cells, rate)
            grid[2][column].set_title(name)
            grid[2][column].set_ylim(bottom=0)
        for axes in (*grid[2][:2], grid[1][2]):
            axes.set_xlabel(label)
            axes.tick_params(axis="x", labelbottom=True)
        grid[2][2].remove()
        style.legend(figure, dict.fromkeys(cell.setup for cell in cells), markers=True)
        return figure


QUANTILES: tuple[tuple[str, Callable[[Summary], Quantiles | None]], ...] = (
    ("TTFT", lambda summary: summary.ttft),
    ("ITL", lambda summary: summary.itl),
    ("End-to-end", lambda summary: summary.e2e),
)
RATES: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
    ("Output tokens/s", lambda summary: summary.throughput),
    ("Goodput, requests/s", lambda summary: summary.goodput),
)


def _quantile(read: Callable[[Summary], Quantiles | None], name: str) -> Callable[[Summary], float | None]:
    return lambda summary: None if (quantiles := read(summary)) is None else getattr(quantiles, name)


def _curve(axes: Axes, cells: Sequence[Cell], read: Callable[[Summary], float | None]) -> None:
    """A line for each setup, in the order of the loads, with the range over repetitions."""
    for setup in dict.fromkeys(cell.setup for cell in cells):
        points = sorted(
            (cell.load.users or cell.load.rate, value, read(cell.measured.least), read(cell.measured.most))
            for cell in cells
            if cell.setup == setup and (value := read(cell.measured.median)) is not None
        )
        if points:
            loads, values, least, most = (np.array(column, dtype=float) for column in zip(*points, strict=True))
            colour = style.colour(setup)
            axes.fill_between(loads, least, most, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                loads,
                values,
                color=colour,
                linestyle=style.line_style(setup),
                marker=style.marker(setup),
                markersize=3.5,
            )
    axes.grid(visible=True)


def groups(cells: Sequence[Cell], read: Callable[[Summary], Mapping[Any, Group]]) -> Figure:
    """Latencies of each client, or of each priority, under each setup: from the median to p99."""
    rows = [(cell, name, group) for cell in cells for name, group in read(cell.measured.median).items()]
    with style.canvas(1.1 + 0.24 * len(rows)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (name, latency) in zip(panels, GROUP_LATENCIES, strict=True):
            for place, (cell, _, group) in enumerate(rows):
                if (quantiles := latency(group)) is not None:
                    _from_median_to_p99(axes, place, quantiles, style.colour(cell.setup))
            for place in range(1, len(rows)):
                if rows[place][0] is not rows[place - 1][0]:
                    axes.axhline(place - 0.5, color="#bbbbbb", linewidth=0.8)
            style.log_seconds(axes, "x")
            axes.set_xlabel(name)
            axes.grid(axis="x")
        panels[0].set_yticks(range(len(rows)), [f"{cell.setup.name}: {group_name(name)}" for cell, name, _ in rows])
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        style.legend_of(
            figure,
            [
                Line2D([], [], color=style.INK, marker="o", linestyle="", label="median"),
                Line2D([], [], color=style.INK, marker="o", linestyle="", fillstyle="none", label="p99"),
            ],
        )
        return figure


GROUP_LATENCIES: tuple[tuple[str, Callable[[Group], Quantiles | None]], ...] = (
    ("TTFT", lambda group: group.ttft),
    ("End-to-end latency", lambda group: group.e2e),
)


def _from_median_to_p99(axes: Axes, place: int, quantiles: Quantiles, colour: str) -> None:
    axes.plot([quantiles.p50, quantiles.p99], [place, place], color=colour, linewidth=2)
    axes.plot(quantiles.p50, place, "o", color=colour, markersize=6)
    axes.plot(quantiles.p99, place, "o", markeredgecolor=colour, markerfacecolor="white", markersize=6)
