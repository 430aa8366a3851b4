"""The pictures of a report: each a legend and panels in SVG, of a width that a telephone can show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any
from zlib import crc32

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter

from shoal.loadtest.costs import CostModel, StepShape
from shoal.loadtest.metrics import Cell, baseline, by, latencies, words
from shoal.loadtest.records import GENERATE, Setup
from shoal.loadtest.trace import bars, ends

Panels = dict[str, str]
"""SVG by title: pairs of axes and, under "legend", what names each line once for all of them."""

WIDTH, HEIGHT = 4.2, 2.5  # inches
INK, PADDING = "#333333", "#b3b3b3"
# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLOURS = {
    "static": "#D55E00",
    "static-nopad": "#E69F00",
    "fcfs": "#0072B2",
    "sjf": "#009E73",
    "priority": "#CC79A7",
    "fair": "#56B4E9",
    "deadline": "#555555",
    GENERATE: "#000000",
}
LINES = {"off": ("-", "o"), "draft": ("--", "^"), "suffix": (":", "s")}  # line and marker
# Of each hue a light one for decoding and a dark one for prefill.
HUES = (("#8ec1e0", "#1b62a5"), ("#fbc07c", "#c8600a"), ("#a3d8a0", "#1e8449"), ("#cdb4e3", "#5e3c99"))
NUM_DRAWN = 96  # requests of the baseline that a timeline shows: some batches
MAX_POINTS = 400  # of a line or a scatter: more cannot be seen
CURVES = ("ttft p50", "ttft p99", "itl p50", "itl p99", "e2e p50", "e2e p99", "throughput", "goodput")
TRADED = ("ttft p50", "ttft p99", "itl p50", "itl p99")
RC: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.markersize": 4,
}


@contextmanager
def panel(panels: Panels, title: str, height: float = HEIGHT) -> Iterator[Axes]:
    """Axes, which become a panel of this title when they are drawn."""
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        yield axes
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        panels[title] = text.getvalue()


def legend(lines: Mapping[str, Mapping[str, Any]]) -> Panels:
    """The legend of a picture, to which panels are added: the styles of its lines by their labels."""
    panels: Panels = {}
    with panel(panels, "legend", 0.1 + 0.2 * -(-len(lines) // 2)) as axes:
        handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
        axes.legend(handles=handles, loc="center left", ncols=2)
        axes.set_title("")
        axes.set_axis_off()
    return panels


def legend_of(cells: Sequence[Cell]) -> Panels:
    return legend({cell.setup.name: style(cell.setup) for cell in cells})


def dots(colour: str, marker: str = "o", **values: Any) -> dict[str, Any]:
    """The style of a mark without a line; a square stands for an area."""
    return {"color": colour, "marker": marker, "linestyle": ""} | ({"markersize": 8} if marker == "s" else {}) | values


def style(setup: Setup) -> dict[str, Any]:
    line, marker = LINES.get(setup.speculation, ("-.", "D"))
    return {"color": colour(setup), "linestyle": line, "marker": marker}


def colour(setup: Setup) -> str:
    return COLOURS.get(setup.policy, "#8C6D31")


def log_seconds(axes: Axes, name: str) -> None:
    """Make an axis, "x" or "y", on which everything is drawn logarithmic, with ticks in the unit that fits."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    least, most = axis.get_view_interval()
    subs = (1,) if most > 100 * least else (1, 3) if most > 8 * least else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(EngFormatter("s"))
    axis.set_minor_formatter(NullFormatter())


# -- what users saw ----------------------------------------------------------------------------------------------------


def throughput(cells: Sequence[Cell]) -> Panels:
    """Throughput and goodput of each setup, with their range over repetitions."""
    panels: Panels = {}
    names, colours = [cell.setup.name for cell in cells], [colour(cell.setup) for cell in cells]
    for name in ("throughput", "goodput"):
        ranges = [(cell.measured.median[name], cell.measured.least[name], cell.measured.most[name]) for cell in cells]
        median, least, most = np.array(ranges).T
        with panel(panels, words(name), 0.6 + 0.3 * len(cells)) as axes:
            shown = axes.barh(names, median, 0.62, color=colours, xerr=[median - least, most - median], ecolor=INK)
            axes.bar_label(shown, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", padding=5)
            axes.margins(x=0.2)
            axes.invert_yaxis()
    return panels


def distributions(cells: Sequence[Cell]) -> Panels:
    """Cumulative distributions of the latencies in one run of each setup."""
    panels = legend_of(cells)
    for name in ("ttft", "itl", "e2e"):
        with panel(panels, words(name)) as axes:
            for cell in cells:
                if values := latencies(record for record in cell.run.requests if record.is_answered)[name]:
                    shown = np.quantile(values, np.linspace(0, 1, MAX_POINTS), method="inverted_cdf")
                    # Tokens that came in one piece have a latency of 0, which has no place on a logarithmic axis.
                    axes.ecdf(np.maximum(shown, 1e-5), markevery=0.25, **style(cell.setup))
            log_seconds(axes, "x")
    return panels


def curves(cells: Sequence[Cell]) -> Panels:
    """Figures against load, with bands over the repetitions, for cells that differ in setup and load only."""
    panels = legend_of(cells)
    for name in CURVES:
        with panel(panels, words(name)) as axes:
            for setup, own in by((cell for cell in cells if name in cell.measured.median), "setup").items():
                loads = [cell.load.users or cell.load.rate for cell in own]
                band = [cell.measured.least[name] for cell in own], [cell.measured.most[name] for cell in own]
                axes.fill_between(loads, *band, color=colour(setup), alpha=0.18, linewidth=0)
                axes.plot(loads, [cell.measured.median[name] for cell in own], **style(setup))
            if name in ("throughput", "goodput"):
                axes.set_ylim(bottom=0)
            elif axes.has_data():
                log_seconds(axes, "y")
            axes.set_xlabel("users" if cells[0].load.users else "requests/s that arrive")
    return panels


def against_throughput(cells: Sequence[Cell]) -> Panels:
    """Latencies against throughput: a point for each load, joined as the load grows, a line for each setup."""
    panels = legend_of(cells)
    for name in TRADED:
        with panel(panels, words(name)) as axes:
            for setup, own in by((cell for cell in cells if name in cell.measured.median), "setup").items():
                points = [(cell.measured.median["throughput"], cell.measured.median[name]) for cell in own]
                axes.plot(*zip(*points, strict=True), **style(setup))
            if axes.has_data():
                log_seconds(axes, "y")
            axes.set_xlim(left=0)
            axes.set_xlabel("output tokens/s")
    return panels


def of_groups(cells: Sequence[Cell], names: Sequence[str]) -> Panels:
    """Latencies of each of these clients or priorities under each setup: from the median to p99."""
    panels = legend({"median": dots(INK), "p99": dots(INK, markerfacecolor="white")})
    rows = [(cell, name) for cell in cells for name in names]
    labels = [f"{cell.setup.name}: {name.removeprefix('client ') or 'no client'}" for cell, name in rows]
    for latency in ("ttft", "e2e"):
        with panel(panels, words(latency), 0.6 + 0.22 * len(rows)) as axes:
            for label, (cell, name) in zip(labels, rows, strict=True):
                both = [cell.measured.median[f"{name}: {latency} {which}"] for which in ("p50", "p99")]
                axes.plot(both, [label, label], color=colour(cell.setup), marker="o", markerfacecolor="white")
                axes.plot(both[:1], [label], color=colour(cell.setup), marker="o")
            log_seconds(axes, "x")
            axes.invert_yaxis()
    return panels


# -- what the engine did -----------------------------------------------------------------------------------------------


def timeline(cells: Sequence[Cell]) -> Panels:
    """Which request occupied which row of the batch, a panel for each setup; a few clients have a colour each."""
    records = [record for cell in cells for record in cell.run.requests]
    clients = sorted(by(records, "client"))
    are_few = 1 < len(clients) <= len(HUES)
    hue_of = {record.engine_id: clients.index(record.client) for record in records if are_few}
    names = clients if are_few else ["decode, a request a colour"]
    decoding = {name: dots(light, "s") for name, (light, _) in zip(names, HUES, strict=False)}
    panels = legend(decoding | {"prefill (dark)": dots(HUES[0][1], "s"), "padding row": dots(PADDING, "s")})
    shown = (baseline(cells) or cells[0]).run
    start = shown.steps[0].start
    until = sorted(record.finished_at or 0.0 for record in shown.requests)[:NUM_DRAWN][-1]
    num_rows = 1 + max(share.row for cell in cells for step in cell.run.steps for share in step.shares)
    for cell in cells:
        with panel(panels, cell.setup.name) as axes:
            for bar in (bar for bar in bars(cell.run.steps) if bar.start < until):
                light, dark = HUES[hue_of.get(bar.request_id, crc32(bar.request_id.encode())) % len(HUES)]
                face = {"decode": light, "prefill": dark, "padding": PADDING}[bar.work]
                axes.barh(bar.row, bar.end - bar.start, 0.9, bar.start, color=face, edgecolor="white", linewidth=0.3)
            axes.set(xlim=(start, until), ylim=(num_rows - 0.5, -0.5), xlabel="time [s]", ylabel="row of the batch")
    return panels


def occupancy(cells: Sequence[Cell]) -> Panels:
    """Batch size over time and its distribution, and the share of the KV cache that was owned and filled."""
    areas = {"rows that work": (INK, 0.75), "padding rows": (PADDING, 1), "owned blocks": (INK, 0.25)}
    panels = legend(
        {label: dots(shade, "s", alpha=alpha) for label, (shade, alpha) in areas.items()}
        | {"slots that are filled": {"color": INK}, "mean": {"color": INK, "linestyle": "--"}}
    )
    until = max(ends(cell.run.steps)[-1] for cell in cells)
    most = 1.05 * max(len(step.shares) for cell in cells for step in cell.run.steps)
    usage = 1.1 * max(cell.measured.median["kv usage peak"] for cell in cells)
    moments = np.linspace(0, until, MAX_POINTS)
    for cell in cells:
        name, shade, steps = cell.setup.name, colour(cell.setup), cell.run.steps
        num_slots = steps[0].num_blocks * cell.run.server.limits.block_size
        num_working = [sum(not share.is_padding for share in step.shares) for step in steps]
        num_rows = [len(step.shares) for step in steps]
        owned = [step.num_used_blocks / step.num_blocks for step in steps]
        filled = [step.num_kv_tokens / num_slots for step in steps]
        place = np.searchsorted([step.start for step in steps], moments, "right") - 1
        goes_on = (place >= 0) & (moments < np.array(ends(steps))[place])
        table = np.where(goes_on, np.array([num_working, num_rows, owned, filled])[:, place], 0)
        with panel(panels, f"{name}: batch", 1.9) as axes:
            axes.stackplot(moments, table[0], table[1] - table[0], colors=[shade, PADDING], alpha=0.75)
            axes.set(xlim=(0, until), ylim=(0, most), xlabel="time [s]", ylabel="rows")
        with panel(panels, f"{name}: rows that work", 1.9) as axes:
            seconds = [step.seconds for step in steps]
            shares = np.bincount(num_working, weights=seconds) / sum(seconds)
            axes.barh(range(len(shares)), shares, 1.0, color=shade, alpha=0.75)
            axes.axhline(cell.measured.median["batch"], color=INK, linestyle="--")
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.set(ylim=(0, most), xlabel="share of time", ylabel="rows")
        with panel(panels, f"{name}: KV cache", 1.9) as axes:
            axes.fill_between(moments, table[2], color=shade, alpha=0.25, linewidth=0)
            axes.plot(moments, table[3], color=shade)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set(xlim=(0, until), ylim=(0, usage), xlabel="time [s]", ylabel="share of the cache")
    return panels


def step_cost(cells: Sequence[Cell], costs: CostModel) -> Panels:
    """What a step takes until the next against what is in it: as measured, and as the cost model has it."""
    panels = legend({"measured steps": dots(PADDING), "cost model, median": {"color": INK}})
    steps = [pair for cell in cells for pair in zip(cell.run.steps, ends(cell.run.steps), strict=True)]
    for title, decodes in (("Steps that only decode", True), ("Steps with prefill or drafts", False)):
        own = [pair for pair in steps if all(share.num_scheduled_tokens == 1 for share in pair[0].shares) == decodes]
        with panel(panels, title) as axes:
            shown = own[:: max(1, len(own) // MAX_POINTS)]
            tokens = np.array([sum(share.num_scheduled_tokens for share in step.shares) for step, _ in shown])
            measured = [1e3 * (end - step.start) for step, end in shown]
            predicted = np.array([1e3 * costs.seconds(StepShape.of(step.shares)) for step, _ in shown])
            axes.plot(tokens, measured, "o", color=PADDING, alpha=0.5)
            counts = np.unique(tokens)
            axes.plot(counts, [np.median(predicted[tokens == count]) for count in counts], color=INK)
            # The hiccups of a machine are not what a step costs.
            axes.set(xlabel="tokens", ylabel="ms", xlim=0, ylim=(0, 1.25 * np.quantile(measured, 0.99) if own else 1))
    return panels


def twin_errors(cells: Sequence[Cell]) -> Panels:
    """Relative errors of the predictions, a line for each figure, with the band that it should keep within."""
    panels = legend_of(cells)
    limits = {name: error.limit or 0.0 for cell in cells for name, error in cell.errors.items()}
    names, widths = list(map(words, limits)), np.array(list(limits.values()))
    with panel(panels, "Predicted over measured, less one", 0.6 + 0.3 * len(limits)) as axes:
        axes.barh(names, 2 * widths, 0.9, -widths, color="#e3ede3")
        for cell, offset in zip(cells, np.linspace(-0.36, 0.36, len(cells)), strict=True):
            places = [names.index(words(name)) + offset for name in cell.errors]
            errors = [error.error for error in cell.errors.values()]
            axes.plot(errors, places, **style(cell.setup) | {"linestyle": ""}, alpha=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xticks([-1, -0.1, 0, 0.1, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    return panels
