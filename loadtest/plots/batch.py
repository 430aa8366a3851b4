"""Pictures of what the engine did: who occupied which row, how full batch and cache were, what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from shoal.loadtest.figures import group_name
from shoal.loadtest.plots import style
from shoal.loadtest.records import Run
from shoal.loadtest.report_data import Cell
from shoal.loadtest.steps import Step
from shoal.loadtest.timeline import Bar, Work, bars, course

# Of each hue one that is light, for decoding, and one that is dark, for prefill.
HUES = (("#8ec1e0", "#1b62a5"), ("#fbc07c", "#c8600a"), ("#a3d8a0", "#1e8449"), ("#cdb4e3", "#5e3c99"))
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")
MAX_POINTS = 1500  # of a scatter: more only cover each other


def timeline(cells: Sequence[Cell], span: tuple[float, float]) -> Figure:
    """Which request occupied which row of the batch, a panel for each setup, in the same stretch of time."""
    labels = _labels([cell.run for cell in cells])
    with style.canvas(0.9 + 1.75 * len(cells)) as figure:
        panels = figure.subplots(len(cells), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, cell in zip(panels, cells, strict=True):
            _rows(axes, cell.run, span, labels)
            axes.set_title(cell.setup.name, color=style.colour(cell.setup))
            axes.set_ylabel("row of the batch")
        num_rows = 1 + max(row.row for cell in cells for step in cell.run.steps for row in step.rows)
        panels[0].set(xlim=span, ylim=(num_rows - 0.5, -0.5))
        panels[-1].set_xlabel("time [s]")
        style.legend_of(figure, _key(labels), num_columns=7)
        return figure


def _labels(runs: Sequence[Run]) -> list[str]:
    """What requests are coloured by where there are a few of it: priorities, or else clients."""
    priorities = {group_name(record.priority) for run in runs for record in run.requests}
    clients = {group_name(record.client) for run in runs for record in run.requests}
    return next((sorted(labels) for labels in (priorities, clients) if 1 < len(labels) <= len(HUES)), [])


def _rows(axes: Axes, run: Run, span: tuple[float, float], labels: Sequence[str]) -> None:
    own_labels = {r.server_id: {group_name(r.priority), group_name(r.client)} for r in run.requests}

    def face(bar: Bar) -> str:
        if bar.work is Work.PADDING:
            return style.FAINT
        own = own_labels.get(bar.request_id, set())
        hue = next((i for i, label in enumerate(labels) if label in own), (bar.row + bar.turn) % len(HUES))
        return HUES[hue][bar.work is Work.PREFILL]

    faces: dict[str, list[Bar]] = {}
    for bar in bars(run.steps):
        if bar.end > span[0] and bar.start < span[1]:
            faces.setdefault(face(bar), []).append(bar)
    for colour, own_bars in faces.items():
        is_padding = colour == style.FAINT
        axes.add_collection(
            PolyCollection(
                [_box(bar) for bar in own_bars],
                facecolor=colour,
                edgecolor=style.PADDING if is_padding else "none",
                linewidth=0,
                hatch="//////" if is_padding else None,
            )
        )
    _mark_end(axes, run.steps[-1].start + run.steps[-1].seconds, span)


def _mark_end(axes: Axes, end: float, span: tuple[float, float]) -> None:
    """A line where all requests have been answered, and its name where there is room."""
    if end < span[1]:
        axes.axvline(end, color=style.INK, linewidth=0.8)
    if end < span[1] - 0.15 * (span[1] - span[0]):
        axes.annotate("all answered", (end, 0.5), (5, 0), ("data", "axes fraction"), "offset points", va="center")


def _box(bar: Bar) -> list[tuple[float, float]]:
    top, bottom = bar.row - 0.45, bar.row + 0.45
    return [(bar.start, top), (bar.end, top), (bar.end, bottom), (bar.start, bottom)]


def _key(labels: Sequence[str]) -> list[Patch]:
    names = labels or ["decode (colours tell requests apart)"]
    return [
        *(Patch(facecolor=HUES[i][0], label=name) for i, name in enumerate(names)),
        Patch(facecolor=HUES[0][1], label="prefill (dark)"),
        Patch(facecolor=style.FAINT, edgecolor=style.PADDING, hatch="//////", linewidth=0, label="padding row"),
        Patch(facecolor="white", edgecolor="#888888", linewidth=0.6, label="empty row"),
    ]


def occupancy(cells: Sequence[Cell]) -> Figure:
    """Batch size over time and its distribution, and the share of the KV cache that was owned and filled."""
    until = max(cell.run.steps[-1].start + cell.run.steps[-1].seconds for cell in cells)
    with style.canvas(0.9 + 1.35 * len(cells)) as figure:
        grid = figure.subplots(len(cells), 3, sharex="col", squeeze=False, width_ratios=(5, 1.6, 4))
        for (left, middle, right), cell in zip(grid, cells, strict=True):
            _over_time(left, right, cell, until)
            _distribution(middle, cell)
            left.set_title(cell.setup.name, color=style.colour(cell.setup))
            right.yaxis.set_major_formatter(_PERCENT)
        most = max(len(step.rows) for cell in cells for step in cell.run.steps)
        for axes in grid[:, :2].ravel():
            axes.set_ylim(0, 1.05 * most)
        for axes, label in zip(grid[-1], ("time [s]", "share of time", "time [s]"), strict=True):
            axes.set_xlabel(label)
        usage = max(axes.get_ylim()[1] for axes in grid[:, 2])
        for left, _, right in grid:
            left.set_ylabel("rows")
            right.set(ylim=(0, usage), ylabel="KV cache")
        style.legend_of(figure, _occupancy_key())
        return figure


def _over_time(rows: Axes, cache: Axes, cell: Cell, until: float) -> None:
    colour = style.colour(cell.setup)
    own = course(cell.run.steps, cell.run.block_size, until)
    rows.fill_between(own.times, own.working, color=colour, alpha=0.75, linewidth=0)
    rows.fill_between(own.times, own.working, own.working + own.padding, color=style.PADDING, linewidth=0)
    cache.fill_between(own.times, own.kv_owned, color=colour, alpha=0.25, linewidth=0)
    cache.plot(own.times, own.kv_filled, color=colour, linewidth=1.1)
    for axes in (rows, cache):
        axes.grid(visible=True)
        axes.set_xlim(own.times[0], until)


def _distribution(axes: Axes, cell: Cell) -> None:
    engine = cell.measured.median.engine
    shares = engine.batch_sizes if engine else ()
    axes.barh(range(len(shares)), shares, height=1.0, color=style.colour(cell.setup), alpha=0.75)
    if engine:
        axes.axhline(engine.batch_size, color=style.INK, linewidth=0.9, linestyle="--")
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.tick_params(axis="y", labelleft=False)
    axes.grid(axis="x")


def _occupancy_key() -> list[Patch | Line2D]:
    return [
        Patch(facecolor=style.INK, alpha=0.75, label="rows that work"),
        Patch(facecolor=style.PADDING, label="padding rows"),
        Line2D([], [], color=style.INK, linestyle="--", linewidth=0.9, label="mean"),
        Patch(facecolor=style.INK, alpha=0.25, label="owned blocks"),
        Line2D([], [], color=style.INK, linewidth=1.1, label="slots that are filled"),
    ]


def step_cost(cells: Sequence[Cell], predict: Callable[[Step], float] | None) -> Figure:
    """What a step takes against what is in it: measured and, where there is a cost model, as it has it."""
    steps = [step for cell in cells for step in cell.run.steps if step.rows]
    decoding = [step for step in steps if all(row.num_tokens == 1 for row in step.rows)]
    others = [step for step in steps if not all(row.num_tokens == 1 for row in step.rows)]
    with style.canvas(3.4) as figure:
        left, middle, right = figure.subplots(1, 3)
        _cost(left, decoding, predict)
        left.set(title="Steps that only decode", xlabel="rows", ylabel="ms a step")
        _cost(middle, decoding, predict, for_each=True)
        middle.set(title="The same, for each row", xlabel="rows", ylabel="ms a row")
        _cost(right, others, predict)
        right.set(title="Steps with prefill or drafts", xlabel="tokens", ylabel="ms a step")
        measured = Line2D([], [], color=style.POINTS, marker="o", markersize=4, linestyle="", label="measured steps")
        model = Line2D([], [], color=style.INK, label="cost model: median of its predictions for the same steps")
        style.legend_of(figure, [measured, model] if predict else [measured])
        return figure


def _cost(
    axes: Axes, steps: Sequence[Step], predict: Callable[[Step], float] | None, *, for_each: bool = False
) -> None:
    """Milliseconds against tokens, of the step or of each token."""
    axes.grid(visible=True)
    if not steps:
        axes.text(0.5, 0.5, "no such steps", transform=axes.transAxes, ha="center")
        return
    thinned = steps[:: max(1, len(steps) // MAX_POINTS)]
    tokens = np.array([_num_tokens(step) for step in thinned])
    scale = 1e3 / (tokens if for_each else np.ones_like(tokens))
    seconds = np.array([step.seconds for step in thinned])
    axes.scatter(tokens, seconds * scale, s=7, color=style.POINTS, alpha=0.35, linewidth=0)
    if predict:
        predicted = np.array([predict(step) for step in thinned]) * scale
        counts = np.unique(tokens)
        axes.plot(counts, [np.median(predicted[tokens == count]) for count in counts], color=style.INK, linewidth=1.4)
    # The hiccups of a machine are not what a step costs.
    axes.set(xlim=(0, 1.03 * tokens.max()), ylim=(0, 1.25 * np.quantile(seconds * scale, 0.99)))


def _num_tokens(step: Step) -> int:
    return sum(row.num_tokens for row in step.rows)
