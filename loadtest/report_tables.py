"""The tables of a report: figures as text, in rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.loadtest import accuracy, figures
from shoal.loadtest.accuracy import compare
from shoal.loadtest.figures import NOTHING, Figure, Unit
from shoal.loadtest.metrics import Combined, Group, Summary
from shoal.loadtest.report_data import Cell, baseline, in_order, load_name


@dataclass(frozen=True, slots=True)
class Value:
    """A cell of a table: a text and, below it in small type, a range or a remark; `alarm` sets it off."""

    text: str = NOTHING
    small: str = ""
    alarm: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table."""

    label: str
    values: Sequence[Value]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of values.

    Attributes:
        columns: headings of the values.
        groups: rows, under headings of their own.
    """

    caption: str
    columns: Sequence[str]
    groups: Mapping[str, Sequence[Row]]


def overview(sections: Mapping[str, Sequence[Cell]], figure: Figure, *, lower_is_better: bool = False) -> Table:
    """The speed-ups in all sections and under all loads, a column for each setup."""
    compared = [
        (section, load, own) for section, cells in sections.items() for load, own in in_order(cells) if baseline(own)
    ]
    names = list(dict.fromkeys(cell.setup.name for _, _, own in compared for cell in own))
    groups: dict[str, list[Row]] = {}
    for section, load, own in compared:
        texts = speed_ups(own, figure, lower_is_better=lower_is_better)
        found = {cell.setup.name: text for cell, text in zip(own, texts, strict=True)}
        row = Row(load_name(load), [Value(found.get(name, NOTHING)) for name in names])
        groups.setdefault(section, []).append(row)
    relation = "how many times lower than" if lower_is_better else "how many times that of"
    return Table(f"{figure.name}: {relation} the static baseline", names, groups)


def verdict(cells: Sequence[Cell]) -> Table:
    """All figures of a workload under one load, a column for each setup: the speed-up over the baseline first."""
    groups: dict[str, list[Row]] = {}
    if base := baseline(cells):
        groups[f"Against {base.setup.name}"] = [
            _speed_up_row("output tokens/s, times as many", cells, figures.THROUGHPUT),
            _speed_up_row("TTFT p50, times lower", cells, figures.TTFT[0], lower_is_better=True),
            _speed_up_row("end-to-end p50, times lower", cells, figures.END_TO_END[0], lower_is_better=True),
        ]
    for heading, own in figures.GROUPS.items():
        known = [figure for figure in own if any(figure.read(cell.measured.median) is not None for cell in cells)]
        if known:
            groups[heading] = [_figure_row(figure, cells) for figure in known]
    caption = f"{load_name(cells[0].load)}. {_repetitions(cells)}"
    return Table(caption, [cell.setup.name for cell in cells], groups)


def speed_ups(cells: Sequence[Cell], figure: Figure, *, lower_is_better: bool = False) -> list[str]:
    """Of each cell of one load, by how much it is better than the static baseline."""
    base = baseline(cells)
    of_base = None if base is None else figure.read(base.measured.median)
    texts = []
    for cell in cells:
        own = figure.read(cell.measured.median)
        ratio = figures.quotient(of_base, own) if lower_is_better else figures.quotient(own, of_base)
        texts.append(NOTHING if ratio is None else f"{figures.number(ratio)}×")  # noqa: RUF001 -- the sign of multiplication
    return texts


def at_each_load(cells: Sequence[Cell]) -> Table:
    """The main figures of a workload, a row for each load and setup."""
    groups = {
        load_name(load): [
            Row(cell.setup.name, [_value(figure, cell.measured) for figure in figures.BRIEF]) for cell in own
        ]
        for load, own in in_order(cells)
    }
    return Table(f"All loads. {_repetitions(cells)}", [figure.heading for figure in figures.BRIEF], groups)


def generator_cost(cells: Sequence[Cell]) -> Table:
    """What the load generator took of the machine that it shares with the server."""
    groups: dict[str, list[Row]] = {}
    for cell in cells:
        values = [_value(figure, cell.measured) for figure in (figures.THROUGHPUT, *figures.GENERATOR)]
        groups.setdefault(f"{cell.section}, {load_name(cell.load)}", []).append(Row(cell.setup.name, values))
    columns = [figure.heading for figure in (figures.THROUGHPUT, *figures.GENERATOR)]
    return Table(_repetitions(cells), columns, groups)


def of_groups(cells: Sequence[Cell], read: Callable[[Summary], Mapping[Any, Group]]) -> Table:
    """What each client, or each priority, got under each setup."""
    latencies = [f"{name}, {which} [ms]" for name in ("TTFT", "end-to-end") for which in ("p50", "p99")]
    groups = {
        cell.setup.name: [
            Row(figures.group_name(name), _group_values(group)) for name, group in read(cell.measured.median).items()
        ]
        for cell in cells
    }
    caption = f"{load_name(cells[0].load)}. {_repetitions(cells)}"
    return Table(caption, ["requests", "output tokens/s", *latencies], groups)


def twin(cells: Sequence[Cell]) -> Table:
    """Predicted against measured: the error of each figure, and below it both values."""
    found = {id(cell): compare(cell.predicted, cell.measured.median) for cell in cells if cell.predicted}
    names = list(dict.fromkeys(figure.name for own in found.values() for figure in own))
    groups: dict[str, list[Row]] = {}
    for cell in cells:
        if own := {figure.name: figure for figure in found.get(id(cell), ())}:
            row = Row(cell.setup.name, [_twin_value(own[name]) if name in own else Value() for name in names])
            groups.setdefault(f"{cell.section}, {load_name(cell.load)}", []).append(row)
    caption = "Error of each prediction, and below it: predicted / measured; tokens/s, and latencies in ms."
    return Table(caption, [figures.title(name) for name in names], groups)


def _speed_up_row(label: str, cells: Sequence[Cell], figure: Figure, *, lower_is_better: bool = False) -> Row:
    return Row(label, [Value(text) for text in speed_ups(cells, figure, lower_is_better=lower_is_better)])


def _figure_row(figure: Figure, cells: Sequence[Cell]) -> Row:
    return Row(figure.heading, [_value(figure, cell.measured) for cell in cells])


def _value(figure: Figure, measured: Combined) -> Value:
    """The median and, of several repetitions, the range."""
    median, least, most = map(figure.read, (measured.median, measured.least, measured.most))
    if median is None:
        return Value()
    text = figures.text(figure.unit, median)
    if least is None or most is None or least == most:
        return Value(text)
    return Value(text, f"{figures.text(figure.unit, least)} to {figures.text(figure.unit, most)}")


def _group_values(group: Group) -> list[Value]:
    latencies = [
        None if quantiles is None else getattr(quantiles, which)
        for quantiles in (group.ttft, group.e2e)
        for which in ("p50", "p99")
    ]
    return [
        Value(figures.number(group.num_requests)),
        Value(figures.number(group.throughput)),
        *(Value() if latency is None else Value(figures.text(Unit.SECONDS, latency)) for latency in latencies),
    ]


def _twin_value(figure: accuracy.Figure) -> Value:
    if figure.error is None:
        return Value()
    unit = Unit.NUMBER if figure.name == "throughput" else Unit.SECONDS
    both = f"{figures.text(unit, figure.predicted)} / {figures.text(unit, figure.measured)}"
    return Value(f"{100 * figure.error:+.1f}%", both, alarm=not figure.is_within)


def _repetitions(cells: Sequence[Cell]) -> str:
    most = max(cell.measured.num_runs for cell in cells)
    return (
        "One run of each."
        if most == 1
        else f"Medians of up to {most} repetitions, and below them the least and the most."
    )
