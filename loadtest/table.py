"""The figures of a comparison as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.loadtest.metrics import Quantiles, Summary
from shoal.loadtest.report_data import Cell, baseline, by_load, by_section, load_name


def tables(cells: Sequence[Cell]) -> Iterator[str]:
    """A table for each workload and load, servers with other options apart.

    Figures are medians over the repetitions; columns without any are left out.
    """
    for section, compared in by_section(cells).items():
        for load, own in by_load(compared).items():
            yield _table(f"{section}, {load_name(load)} (times in ms)", own)


def _table(title: str, cells: Sequence[Cell]) -> str:
    static = baseline(cells)
    rows = [_row(cell, static) for cell in cells]
    headings = [heading for heading, _ in rows[0]]
    columns = [
        [heading, *texts]
        for heading, texts in zip(headings, zip(*([text for _, text in row] for row in rows), strict=True), strict=True)
        if any(texts)
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = [_line(texts, widths) for texts in zip(*columns, strict=True)]
    return "\n".join([title, *lines])


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    padded = [text.rjust(width) for text, width in zip(texts, widths, strict=True)]
    return "  ".join([texts[0].ljust(widths[0]), *padded[1:]])


def _row(cell: Cell, static: Cell | None) -> list[tuple[str, str]]:
    """Headings and texts; an empty text stands for what there is nothing to say of."""
    summary = cell.measured.median
    engine = summary.engine
    return [
        ("policy", cell.setup.name),
        ("tokens/s", _number(summary.throughput)),
        ("x static", _number(_ratio(summary, static))),
        ("goodput/s", _number(summary.goodput)),
        ("TTFT p50", _milliseconds(summary.ttft, "p50")),
        ("p99", _milliseconds(summary.ttft, "p99")),
        ("ITL p50", _milliseconds(summary.itl, "p50")),
        ("p99", _milliseconds(summary.itl, "p99")),
        ("end-to-end p50", _milliseconds(summary.e2e, "p50")),
        ("p99", _milliseconds(summary.e2e, "p99")),
        ("mean", _milliseconds(summary.e2e, "mean")),
        ("queueing p50", _milliseconds(summary.queueing, "p50")),
        ("batch", _number(engine.batch_size) if engine else ""),
        ("padding", f"{engine.padding_share:.0%}" if engine and engine.padding_share else ""),
        ("KV used", f"{engine.kv_utilisation:.0%}" if engine else ""),
        ("preempted", str(round(engine.num_preemptions)) if engine and engine.num_preemptions else ""),
        ("Jain", _number(summary.jain)),
        ("errors", str(round(summary.num_errors)) if summary.num_errors else ""),
    ]


def _ratio(summary: Summary, static: Cell | None) -> float | None:
    base = static.measured.median.throughput if static else 0.0
    return summary.throughput / base if base else None


def _milliseconds(latency: Quantiles | None, name: str) -> str:
    return _number(1000 * getattr(latency, name)) if latency else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
