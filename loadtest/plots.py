"""The pictures of a report: each a legend and panels in SVG, of a width that a telephone can show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import StringIO
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from msgspec import Struct
from numpy.typing import NDArray

from shoal.loadtest.metrics import Cell, baseline, e2e, groups, itl, ttft
from shoal.loadtest.records import RequestRecord, Setup
from shoal.loadtest.trace import bars, window
from shoal.loadtest.twin import compare
from shoal.scheduler.step_record import StepRecord

WIDTH, HEIGHT = 4.2, 2.5  # inches
INK, POINTS, FAINT, PADDING = "#333333", "#7a7a7a", "#dddddd", "#b3b3b3"
# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLOURS = {
    "static": "#D55E00",
    "static-nopad": "#E69F00",
    "fcfs": "#0072B2",
    "sjf": "#009E73",
    "priority": "#CC79A7",
    "fair": "#56B4E9",
    "deadline": "#555555",
}
OTHER_COLOUR = "#8C6D31"
LINES: dict[str, tuple[Any, str]] = {"off": ("-", "o"), "draft": ("--", "^"), "ngram": (":", "s")}  # line and marker
OTHER_LINE = ("-.", "D")
# Of each hue a light one for decoding and a dark one for prefill.
HUES = (("#8ec1e0", "#1b62a5"), ("#fbc07c", "#c8600a"), ("#a3d8a0", "#1e8449"), ("#cdb4e3", "#5e3c99"))
MAX_POINTS = 400  # of a curve or a scatter: more cannot be seen
NUM_STRETCHES = 200  # of time, in a picture of a whole run
LARGEST_ERROR = 40.0  # percent; what is beyond is drawn at the edge, as a triangle

RC: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.5,
}
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")
Floats = NDArray[np.float64]


class Panel(Struct):
    """A pair of axes, or the legend of all panels of a picture."""

    svg: str
    title: str = ""
    is_legend: bool = False


class Picture(Struct, kw_only=True):
    """A picture as the report shows it.

    Attributes:
        kind: what is drawn, by which the page has its caption.
        name: of its files and its anchor.
    """

    kind: str
    name: str
    title: str
    panels: list[Panel]


def panel(draw: Callable[[Axes], object], title: str = "", height: float = HEIGHT) -> Panel:
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        draw(axes)
        return Panel(_svg(figure), title)


def legend(handles: Sequence[Artist]) -> Panel:
    """Names each line once, for all panels of a picture."""
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH, 0.1 + 0.2 * -(-len(handles) // 2)))
        figure.legend(handles=handles, loc="center left", ncols=2, handlelength=2.2, borderpad=0)
        return Panel(_svg(figure), "legend", is_legend=True)


def legend_of(setups: Iterable[Setup], *, markers: bool = False) -> Panel:
    return legend(
        [Line2D([], [], label=setup.name, **style(setup, markers=markers)) for setup in dict.fromkeys(setups)]
    )


def _svg(figure: Figure) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def style(setup: Setup, *, markers: bool = False) -> dict[str, Any]:
    line, marker = LINES.get(setup.speculation, OTHER_LINE)
    return {"color": colour(setup), "linestyle": line} | ({"marker": marker, "markersize": 4} if markers else {})


def colour(setup: Setup) -> str:
    return COLOURS.get(setup.policy, OTHER_COLOUR)


def log_seconds(axes: Axes, axis: str) -> None:
    """Make an axis on which everything is drawn logarithmic, with ticks in the unit that fits."""

    def duration(seconds: float, _: object) -> str:
        return (
            f"{seconds:g} s"
            if seconds >= 1
            else f"{1e3 * seconds:g} ms"
            if seconds >= 1e-3
            else f"{1e6 * seconds:g} µs"
        )

    own = axes.xaxis if axis == "x" else axes.yaxis
    axes.set(**{f"{axis}scale": "log"})
    least, most = own.get_view_interval()
    subs = (1,) if most > 100 * least else (1, 3) if most > 8 * least else (1, 1.5, 2, 3, 5, 7)
    own.set_major_locator(LogLocator(subs=subs, numticks=6))
    own.set_major_formatter(FuncFormatter(duration))
    own.set_minor_formatter(NullFormatter())


# -- what users saw ----------------------------------------------------------------------------------------------------


def throughput(cells: Sequence[Cell]) -> list[Panel]:
    """Throughput and goodput of each setup, with their range over repetitions."""

    def draw(name: str, axes: Axes) -> None:
        most = max(cell.measured.most[name] for cell in cells) or 1
        for place, cell in enumerate(cells):
            value, least, top = (one[name] for one in (cell.measured.median, cell.measured.least, cell.measured.most))
            axes.barh(place, value, height=0.62, color=colour(cell.setup), alpha=0.85)
            if cell.measured.num_runs > 1:
                axes.plot([least, top], [place, place], color=INK, linewidth=1.2, marker="|", markersize=7)
            label = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(label, (top, place), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set(xlim=(0, 1.2 * most))
        axes.set_yticks(range(len(cells)), [cell.setup.name for cell in cells])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    height = 0.6 + 0.3 * len(cells)
    titles = {"throughput": "Output tokens/s", "goodput": "Goodput, requests/s"}
    return [panel(partial(draw, name), title, height) for name, title in titles.items()]


LATENCIES: dict[str, Callable[[RequestRecord], Iterable[float | None]]] = {
    "TTFT": lambda record: [ttft(record)],
    "ITL": itl,
    "End-to-end latency": lambda record: [e2e(record)],
}


def distributions(cells: Sequence[Cell]) -> list[Panel]:
    """Cumulative distributions of the latencies in one run of each setup."""

    def draw(read: Callable[[RequestRecord], Iterable[float | None]], axes: Axes) -> None:
        for cell in cells:
            answered = [record for record in cell.run.requests if record.is_answered]
            known = [value for record in answered for value in read(record) if value is not None]
            if known:
                shares = np.linspace(0, 1, min(len(known), MAX_POINTS) + 1)
                # Tokens that came in one piece have a latency of 0, which has no place on a logarithmic axis.
                values = np.maximum(np.quantile(known, shares, method="inverted_cdf"), 1e-5)
                axes.step(values, shares, where="pre", **style(cell.setup))
        log_seconds(axes, "x")
        axes.set(ylim=(0, 1))

    panels = [panel(partial(draw, read), name) for name, read in LATENCIES.items()]
    return [legend_of(cell.setup for cell in cells), *panels]


CURVES = {
    "ttft p50": "TTFT, p50",
    "ttft p99": "TTFT, p99",
    "itl p50": "ITL, p50",
    "itl p99": "ITL, p99",
    "e2e p50": "End-to-end, p50",
    "e2e p99": "End-to-end, p99",
    "throughput": "Output tokens/s",
    "goodput": "Goodput, requests/s",
}


def curves(cells: Sequence[Cell]) -> list[Panel]:
    """Figures against load, with bands over the repetitions, for cells that differ in setup and load only."""
    x_label = "users" if cells[0].load.users else "requests/s that arrive"

    def draw(name: str, axes: Axes) -> None:
        for setup in dict.fromkeys(cell.setup for cell in cells):
            own = [cell for cell in cells if cell.setup == setup and name in cell.measured.median]
            own.sort(key=lambda cell: (cell.load.users, cell.load.rate))
            loads = [cell.load.users or cell.load.rate for cell in own]
            least, most = ([one[name] for one in (getattr(c.measured, end) for c in own)] for end in ("least", "most"))
            axes.fill_between(loads, least, most, color=colour(setup), alpha=0.18, linewidth=0)
            axes.plot(loads, [cell.measured.median[name] for cell in own], **style(setup, markers=True))
        if name in ("throughput", "goodput"):
            axes.set_ylim(bottom=0)
        elif axes.has_data():
            log_seconds(axes, "y")
        axes.set_xlabel(x_label)

    panels = [panel(partial(draw, name), title) for name, title in CURVES.items()]
    return [legend_of((cell.setup for cell in cells), markers=True), *panels]


def of_groups(cells: Sequence[Cell], kind: str) -> list[Panel]:
    """Latencies of each client, or of each priority, under each setup: from the median to p99."""
    rows = [(cell, name) for cell in cells for name in groups(cell.measured.median, kind)]

    def draw(latency: str, axes: Axes) -> None:
        for place, (cell, name) in enumerate(rows):
            median, p99 = (cell.measured.median.get(f"{name}: {latency} {which}") for which in ("p50", "p99"))
            if median is not None and p99 is not None:
                axes.plot([median, p99], [place, place], color=colour(cell.setup), linewidth=2)
                axes.plot(median, place, "o", color=colour(cell.setup))
                axes.plot(p99, place, "o", color=colour(cell.setup), markerfacecolor="white")
            if place and rows[place - 1][0] is not cell:
                axes.axhline(place - 0.5, color="#bbbbbb", linewidth=0.8)
        log_seconds(axes, "x")
        labels = [f"{cell.setup.name}: {name.removeprefix('client ') or 'no client'}" for cell, name in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")

    handles = [
        Line2D([], [], color=INK, marker="o", linestyle="", label="median"),
        Line2D([], [], color=INK, marker="o", linestyle="", fillstyle="none", label="p99"),
    ]
    height, titles = 0.6 + 0.22 * len(rows), {"ttft": "TTFT", "e2e": "End-to-end latency"}
    panels = [panel(partial(draw, name), title, height) for name, title in titles.items()]
    return [legend(handles), *panels]


# -- what the engine did -----------------------------------------------------------------------------------------------


def timeline(cells: Sequence[Cell]) -> list[Panel]:
    """Which request occupied which row of the batch, a panel for each setup, in the same stretch of time."""
    span = window((baseline(cells) or cells[0]).run.steps)
    num_rows = 1 + max(share.row for cell in cells for step in cell.run.steps for share in step.shares)
    names, hue_of = _hues(cells)

    def draw(cell: Cell, axes: Axes) -> None:
        boxes: defaultdict[str, list[list[tuple[float, float]]]] = defaultdict(list)
        for bar in bars(cell.run.steps):
            if bar.end > span[0] and bar.start < span[1]:
                hue = HUES[hue_of.get(bar.request_id, (bar.row + bar.turn) % len(HUES))]
                face = FAINT if bar.work == "padding" else hue[bar.work == "prefill"]
                top, bottom = bar.row - 0.45, bar.row + 0.45
                boxes[face].append([(bar.start, top), (bar.end, top), (bar.end, bottom), (bar.start, bottom)])
        for face, own in boxes.items():
            hatch: Any = {"edgecolor": PADDING, "hatch": "//////"} if face == FAINT else {}
            axes.add_collection(PolyCollection(own, facecolor=face, linewidth=0, **hatch))
        if (end := _end(cell.run.steps[-1])) < span[1]:
            axes.axvline(end, color=INK, linewidth=0.8)
        axes.set(xlim=span, ylim=(num_rows - 0.5, -0.5), xlabel="time [s]", ylabel="row of the batch")

    handles = [
        *(
            Patch(facecolor=HUES[hue][0], label=name)
            for hue, name in enumerate(names or ["decode, a request a colour"])
        ),
        Patch(facecolor=HUES[0][1], label="prefill (dark)"),
        Patch(facecolor=FAINT, edgecolor=PADDING, hatch="//////", linewidth=0, label="padding row"),
        Patch(facecolor="white", edgecolor="#888888", linewidth=0.6, label="empty row"),
    ]
    return [legend(handles), *(panel(partial(draw, cell), cell.setup.name) for cell in cells)]


def _hues(cells: Sequence[Cell]) -> tuple[list[str], dict[str, int]]:
    """What requests are coloured by, where there are a few of it: priorities, or else clients; and each one's hue."""
    records = [record for cell in cells for record in cell.run.requests]
    for kind in ("priority", "client"):
        values = sorted({getattr(record, kind) for record in records})
        if 1 < len(values) <= len(HUES):
            hues = {record.engine_id: values.index(getattr(record, kind)) for record in records}
            return [f"{kind} {value}" for value in values], hues
    return [], {}


def occupancy(cells: Sequence[Cell]) -> list[Panel]:
    """Batch size over time and its distribution, and the share of the KV cache that was owned and filled."""
    until = max(_end(cell.run.steps[-1]) for cell in cells)
    most = max(len(step.shares) for cell in cells for step in cell.run.steps)
    usage = max(1.1 * cell.measured.median["kv usage peak"] for cell in cells)

    def draw_rows(cell: Cell, axes: Axes) -> None:
        padding = np.array([sum(share.is_padding for share in step.shares) for step in cell.run.steps])
        rows = np.array([len(step.shares) for step in cell.run.steps])
        times, working = _over_time(cell.run.steps, rows - padding, until)
        _, padded = _over_time(cell.run.steps, rows, until)
        axes.fill_between(times, working, color=colour(cell.setup), alpha=0.75, linewidth=0)
        axes.fill_between(times, working, padded, color=PADDING, linewidth=0)
        axes.set(xlim=(0, until), ylim=(0, 1.05 * most), xlabel="time [s]", ylabel="rows")

    def draw_shares(cell: Cell, axes: Axes) -> None:
        working = [sum(not share.is_padding for share in step.shares) for step in cell.run.steps]
        seconds = [step.seconds for step in cell.run.steps]
        shares = np.bincount(working, weights=seconds) / sum(seconds)
        axes.barh(range(len(shares)), shares, height=1.0, color=colour(cell.setup), alpha=0.75)
        axes.axhline(cell.measured.median["batch"], color=INK, linewidth=0.9, linestyle="--")
        axes.xaxis.set_major_formatter(PERCENT)
        axes.set(ylim=(0, 1.05 * most), xlabel="share of time", ylabel="rows that work")

    def draw_cache(cell: Cell, axes: Axes) -> None:
        steps, block_size = cell.run.steps, cell.run.server.limits.block_size
        times, owned = _over_time(steps, np.array([step.num_used_blocks / step.num_blocks for step in steps]), until)
        filled = np.array([step.num_kv_tokens / (step.num_blocks * block_size) for step in steps])
        axes.fill_between(times, owned, color=colour(cell.setup), alpha=0.25, linewidth=0)
        axes.plot(times, _over_time(steps, filled, until)[1], color=colour(cell.setup), linewidth=1.1)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set(xlim=(0, until), ylim=(0, usage), xlabel="time [s]", ylabel="KV cache")

    handles = [
        Patch(facecolor=INK, alpha=0.75, label="rows that work"),
        Patch(facecolor=PADDING, label="padding rows"),
        Line2D([], [], color=INK, linestyle="--", linewidth=0.9, label="mean"),
        Patch(facecolor=INK, alpha=0.25, label="owned blocks"),
        Line2D([], [], color=INK, linewidth=1.1, label="slots that are filled"),
    ]
    draws = draw_rows, draw_shares, draw_cache
    return [legend(handles), *(panel(partial(draw, cell), cell.setup.name, 1.9) for cell in cells for draw in draws)]


def _over_time(steps: Sequence[StepRecord], values: Floats, until: float) -> tuple[Floats, Floats]:
    """Middles of short stretches of time, and the mean of a value of the steps in each.

    What a step says holds until the next one starts if some request goes on, else until its own end.
    """
    edges = np.linspace(0.0, until, NUM_STRETCHES + 1)
    names = [{share.request_id for share in step.shares} for step in steps]
    starts = np.array([step.start for step in steps])
    ends = np.array([_end(step) for step in steps])
    goes_on = [not one.isdisjoint(following) for one, following in pairwise(names)]
    ends[:-1] = np.where(goes_on, starts[1:], ends[:-1])
    integral = np.repeat(np.concatenate([[0.0], np.cumsum(values * (ends - starts))]), 2)[1:-1]
    moments = np.stack([starts, ends], axis=1).ravel()
    return (edges[:-1] + edges[1:]) / 2, np.diff(np.interp(edges, moments, integral)) / np.diff(edges)


def _end(step: StepRecord) -> float:
    return step.start + step.seconds


def step_cost(cells: Sequence[Cell], predict: Callable[[StepRecord], float]) -> list[Panel]:
    """What a step takes against what is in it: as measured, and as the cost model has it."""
    steps = [step for cell in cells for step in cell.run.steps]
    decoding = [step for step in steps if all(share.num_scheduled_tokens == 1 for share in step.shares)]
    others = [step for step in steps if any(share.num_scheduled_tokens != 1 for share in step.shares)]

    def draw(own: Sequence[StepRecord], label: str, is_for_each: bool, axes: Axes) -> None:
        shown = own[:: max(1, len(own) // MAX_POINTS)]
        axes.set(xlabel=label, ylabel="ms a row" if is_for_each else "ms a step")
        if not shown:
            axes.text(0.5, 0.5, "no such steps", transform=axes.transAxes, ha="center")
            return
        tokens = np.array([sum(share.num_scheduled_tokens for share in step.shares) for step in shown])
        scale = 1e3 / (tokens if is_for_each else np.ones_like(tokens))
        measured, predicted = (
            np.array([read(step) for step in shown]) * scale for read in (attrgetter("seconds"), predict)
        )
        axes.scatter(tokens, measured, s=7, color=POINTS, alpha=0.35, linewidth=0)
        counts = np.unique(tokens)
        axes.plot(counts, [np.median(predicted[tokens == count]) for count in counts], color=INK)
        # The hiccups of a machine are not what a step costs.
        axes.set(xlim=(0, 1.03 * tokens.max()), ylim=(0, 1.25 * np.quantile(measured, 0.99)))

    handles = [
        Line2D([], [], color=POINTS, marker="o", markersize=4, linestyle="", label="measured steps"),
        Line2D([], [], color=INK, label="cost model, median"),
    ]
    return [
        legend(handles),
        panel(partial(draw, decoding, "rows", False), "Steps that only decode"),
        panel(partial(draw, decoding, "rows", True), "The same, for each row"),
        panel(partial(draw, others, "tokens", False), "Steps with prefill or drafts"),
    ]


def twin_errors(cells: Sequence[Cell]) -> list[Panel]:
    """Relative errors of the predictions, a line for each figure, with the band that it should keep within."""
    found = [
        (cell.setup, {error.name: error for error in compare(cell.predicted, cell.measured.median)})
        for cell in cells
        if cell.predicted
    ]
    names = list(dict.fromkeys(name for _, own in found for name in own))

    def draw(axes: Axes) -> None:
        for place, name in enumerate(names):
            own = [(setup, errors[name]) for setup, errors in found if name in errors]
            if limit := own[0][1].limit:
                axes.add_patch(Rectangle((-100 * limit, place - 0.45), 200 * limit, 0.9, color="#e3ede3", linewidth=0))
            for (setup, error), offset in zip(own, np.linspace(-0.36, 0.36, len(own)), strict=True):
                if error.error is not None:
                    percent = 100 * error.error
                    inside = min(max(percent, -LARGEST_ERROR), LARGEST_ERROR)
                    marker = (
                        LINES.get(setup.speculation, OTHER_LINE)[1]
                        if inside == percent
                        else "<"
                        if percent < 0
                        else ">"
                    )
                    axes.plot(inside, place + offset, marker, color=colour(setup), markersize=4.5, alpha=0.8)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(-1.05 * LARGEST_ERROR, 1.05 * LARGEST_ERROR))
        axes.set_xlabel("error of the prediction [%]")

    return [legend_of((setup for setup, _ in found), markers=True), panel(draw, height=0.6 + 0.3 * len(names))]
