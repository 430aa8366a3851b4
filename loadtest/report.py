"""The report of a comparison: tables on the terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from msgspec import Struct

from shoal.loadtest import plots
from shoal.loadtest.metrics import Cell, Slo, baseline, by, groups, in_order, main_cells, speed_up
from shoal.loadtest.plots import Panel, Picture
from shoal.loadtest.records import slug
from shoal.loadtest.twin import compare
from shoal.scheduler.step_record import StepRecord

StepSeconds = Callable[[StepRecord], float]

NOTHING = "–"  # noqa: RUF001 -- the dash of an empty cell
MAX_GROUPS = 8  # more clients are neither picture nor table
MAX_NAMED = 5

# The tables of a workload: figures by name.
TABLES = {
    "Throughput": ("throughput", "request rate", "goodput", "goodput share", "jain", "errors"),
    "TTFT": tuple(f"{what} {p}" for what in ("ttft", "ttft from admission", "queueing") for p in ("p50", "p90", "p99")),
    "Latency": (*(f"{what} {p}" for what in ("itl", "tpot", "e2e") for p in ("p50", "p90", "p99")), "e2e mean"),
    "Batch": ("batch", "padding share", "tokens per step", "step seconds", "preemptions", "acceptance rate"),
    "KV cache": ("kv usage", "kv usage peak", "kv utilisation", "kv waste", "cached share"),
    "Processor time": ("generator cores", "generator cores per 1000", "api cores", "engine cores"),
}
OF_GROUPS = ("requests", "throughput", "ttft p50", "ttft p99", "e2e p50", "e2e p99")
TERMINAL = (
    *("throughput", "goodput", "ttft p50", "ttft p99", "itl p50", "itl p99", "e2e p50", "e2e mean", "e2e p99"),
    *("queueing p50", "batch", "padding share", "kv utilisation", "preemptions", "jain", "errors"),
)
WORDS = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "end-to-end", "kv": "KV", "throughput": "tokens/s"}
IN_MS = ("p50", "p90", "p99", "mean", "seconds")
IN_PERCENT = ("share", "acceptance rate", "usage", "peak", "utilisation", "cores", "1000")


class Report(Struct, kw_only=True):
    """All that a report says.

    Attributes:
        made_at: when, for people.
        command: the line that makes the same comparison again.
        machine: what it ran on, value by name.
        cells: in the order in which they are shown.
        differing: by workload, the requests whose answers were not the same in all runs.
        complaints: what must not be overlooked.
        warnings: further things to know before believing the figures.
        step_seconds: the twin's cost model.
    """

    made_at: str
    command: str
    machine: Mapping[str, str]
    model: str
    slo: Slo
    cells: Sequence[Cell]
    differing: Mapping[str, Sequence[str]] = {}
    complaints: Sequence[str] = ()
    warnings: Sequence[str] = ()
    step_seconds: StepSeconds | None = None


class Value(Struct):
    """A cell of a table: a text and, below it in small type, a range or a remark; `alarm` marks it."""

    text: str = NOTHING
    small: str = ""
    alarm: bool = False


class Table(Struct):
    """Labelled rows of values, under headings of their own."""

    caption: str
    columns: Sequence[str]
    groups: dict[str, list[tuple[str, list[Value]]]]


class Section(Struct, kw_only=True):
    """A chapter: paragraphs, pictures, and tables, which fold."""

    name: str
    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


# -- tables ------------------------------------------------------------------------------------------------------------


def title(name: str) -> str:
    """A figure as people write it, with its unit."""
    unit = " [ms]" if name.endswith(IN_MS) else " [%]" if name.endswith(IN_PERCENT) else ""
    return " ".join(WORDS.get(word, word) for word in name.split()) + unit


def text(name: str, value: float | None) -> str:
    """A figure's value in the unit of its title: three digits, or all of a large number."""
    if value is None:
        return NOTHING
    value *= 1e3 if name.endswith(IN_MS) else 100 if name.endswith(IN_PERCENT) else 1
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".") if value else "0"


def figure(name: str, cell: Cell) -> Value:
    """The median and, of several repetitions, the range."""
    median, least, most = (
        text(name, one.get(name)) for one in (cell.measured.median, cell.measured.least, cell.measured.most)
    )
    return Value(median, "" if least == most else f"{least} to {most}")


def times(name: str, cell: Cell, base: Cell | None) -> str:
    """How many times better than the baseline."""
    ratio = speed_up(name, cell, base)
    return NOTHING if ratio is None else f"{ratio:#.3g}×"  # noqa: RUF001 -- the sign of multiplication


def figures_table(caption: str, cells: Sequence[Cell], names: Sequence[str]) -> Table:
    """A row for each load and setup; first the speed-up over the static baseline, if there is one."""
    known = [name for name in names if any(name in cell.measured.median for cell in cells)]
    compared = [name for name in ("throughput", "ttft p50", "e2e p50") if name in names and baseline(cells)]
    rows: dict[str, list[tuple[str, list[Value]]]] = {}
    for load, own in in_order(cells):
        rows[str(load)] = [
            (
                cell.setup.name,
                [Value(times(name, cell, baseline(own))) for name in compared] + [figure(name, cell) for name in known],
            )
            for cell in own
        ]
    return Table(caption, [f"{title(name)}, × better" for name in compared] + list(map(title, known)), rows)  # noqa: RUF001


def terminal_tables(cells: Sequence[Cell]) -> Iterator[str]:
    """A table for each section and load, in text; columns of nothing but zeros are left out."""
    for section, own in by(cells, "section").items():
        for load, compared in by(own, "load").items():
            names = [name for name in TERMINAL if any(cell.measured.median.get(name) for cell in compared)]
            rows = [["policy", "× static", *map(title, names)]]  # noqa: RUF001
            for cell in compared:
                values = [figure(name, cell).text for name in names]
                rows.append([cell.setup.name, times("throughput", cell, baseline(compared)), *values])
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
            yield "\n".join([f"{section}, {load}", *lines])


# -- the page ----------------------------------------------------------------------------------------------------------


def write_report(folder: Path, report: Report) -> None:
    """Write `report.html`, and the panels of its pictures as SVG files in `pictures/`."""
    sections = list(_sections(report))
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for picture in (picture for section in sections for picture in section.pictures):
        for number, panel in enumerate(picture.panels):
            (folder / "pictures" / f"{picture.name}-{number}.svg").write_text(panel.svg, "utf-8")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["base64"] = lambda image: b64encode(image.encode()).decode()
    page = environment.get_template("report.html.j2").render(
        report=report, sections=sections, warnings=list(_warnings(report))
    )
    (folder / "report.html").write_text(page, "utf-8")


def _warnings(report: Report) -> Iterable[str]:
    """What a reader must know before believing anything."""
    for workload, requests in report.differing.items():
        named = ", ".join(requests[:MAX_NAMED]) + (", …" if len(requests) > MAX_NAMED else "")
        yield f"{workload}: the texts of {len(requests)} requests are not the same in all runs ({named})."
    yield from report.warnings
    yield from (problem for cell in report.cells for problem in cell.problems)


def _sections(report: Report) -> Iterable[Section]:
    if not report.cells:
        yield Section(name="nothing", title="Nothing to show", paragraphs=["No run was measured."])
    sections = by(report.cells, "section")
    for number, (section, cells) in enumerate(sections.items(), 1):
        name = f"{slug(section).lower()}-{number}"
        captions = {f"{caption}. {_repetitions(cells)}": names for caption, names in TABLES.items()}
        yield Section(
            name=name,
            title=f"Workload {section}",
            paragraphs=list(_paragraphs(cells, report)),
            pictures=list(_pictures(name, cells, report.step_seconds if number == 1 else None)),
            tables=[
                *(figures_table(caption, cells, names) for caption, names in captions.items()),
                *(_of_groups(own, kind) for own, kind in _groupings(cells)),
            ],
        )
    predicted = [cell for cell in report.cells if cell.predicted]
    yield (
        _twin(predicted)
        if predicted
        else Section(
            name="prediction", title="Predicted against measured", paragraphs=["The digital twin was not asked."]
        )
    )


def _paragraphs(cells: Sequence[Cell], report: Report) -> Iterable[str]:
    """What the pictures and tables of a workload come to, and what was compared."""
    main = main_cells(cells)
    base, best = baseline(main), max(main, key=lambda cell: cell.measured.median["throughput"])
    if base is None:
        yield "There is no static baseline among the setups, so there are no speed-ups."
    elif best is not base:
        more, sooner = (times(name, best, base) for name in ("throughput", "ttft p50"))
        yield (
            f"{best.load}: {best.setup.name} has {more} the output tokens/s of {base.setup.name}, and a median TTFT "
            f"that is {sooner} lower."
        )
    for cell in cells:
        # A static batch that waits for requests which do not come has its timeout as its TTFT.
        timeout = cell.run.server.settings.get("scheduler", {}).get("static_timeout_seconds", 0.0)
        waited, first = (cell.measured.median.get(name, 0.0) for name in ("queueing p50", "ttft p50"))
        if cell.setup.policy.startswith("static") and first / 2 < waited <= 1.2 * timeout:
            yield (
                f"{cell.load}: of its median TTFT, {1e3 * first:.0f} ms, {cell.setup.name} waited {1e3 * waited:.0f} ms"
                f" for a batch to fill (static_timeout_seconds is {timeout:g}). TTFT from admission leaves this out."
            )
    least = min(cell.measured.least["output tokens"] for cell in cells)
    most = max(cell.measured.most["output tokens"] for cell in cells)
    verdict = "Same work" if least == most else "NOT the same work"
    tokens = f"{least:,.0f}" if least == most else f"from {least:,.0f} to {most:,.0f}"
    texts = "are NOT all identical" if report.differing.get(cells[0].workload) else "are identical, request by request"
    yield f"{verdict}: every run answered with {tokens} output tokens, and the texts of all runs {texts}."
    answered = [record for record in cells[0].run.requests if record.is_answered]
    for what in ("prompt", "output") if answered else ():
        lengths = [getattr(record, f"num_{what}_tokens") for record in answered]
        median, p90 = np.quantile(lengths, (0.5, 0.9))
        yield f"{len(answered)} requests; tokens of {what}: median {median:.0f}, p90 {p90:.0f}, at most {max(lengths)}."
    for options in dict.fromkeys(cell.setup.options for cell in cells if cell.setup.options):
        yield f"Servers ran with {' '.join(options)}."


def _repetitions(cells: Sequence[Cell]) -> str:
    most = max(cell.measured.num_runs for cell in cells)
    return "One run of each" if most == 1 else f"Medians of up to {most} repetitions, and below them their range"


def _groupings(cells: Sequence[Cell]) -> list[tuple[list[Cell], str]]:
    """The cells of one load, and what their requests can be told apart by."""
    return [
        (own, kind)
        for _, own in in_order(cells)
        for kind in ("client", "priority")
        if 1 < max(len(groups(cell.measured.median, kind)) for cell in own) <= MAX_GROUPS
    ]


def _of_groups(cells: Sequence[Cell], kind: str) -> Table:
    """What each client, or each priority, got under each setup."""
    rows = {
        cell.setup.name: [
            (group, [Value(text(name, cell.measured.median.get(f"{group}: {name}"))) for name in OF_GROUPS])
            for group in groups(cell.measured.median, kind)
        ]
        for cell in cells
    }
    return Table(f"Each {kind} apart, {cells[0].load}", list(map(title, OF_GROUPS)), rows)


def _twin(cells: Sequence[Cell]) -> Section:
    """The errors of the predictions."""
    names: dict[str, None] = {}
    rows: dict[str, list[tuple[str, list[Value]]]] = {}
    for cell in cells:
        values = []
        for error in compare(cell.predicted or {}, cell.measured.median):
            names[error.name] = None
            both = f"{text(error.name, error.predicted)} / {text(error.name, error.measured)}"
            shown = NOTHING if error.error is None else f"{100 * error.error:+.1f}%"
            values.append(Value(shown, both, alarm=not error.is_within))
        rows.setdefault(f"{cell.section}, {cell.load}", []).append((cell.setup.name, values))
    panels = plots.twin_errors(cells)
    return Section(
        name="prediction",
        title="Predicted against measured",
        pictures=[Picture(kind="twin", name="twin", title="Errors of the digital twin", panels=panels)],
        tables=[Table("Error of each prediction, and below it: predicted / measured", list(map(title, names)), rows)],
    )


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(name: str, cells: Sequence[Cell], step_seconds: StepSeconds | None) -> Iterator[Picture]:
    """The pictures of one workload, as far as there is something to draw.

    Args:
        step_seconds: costs of steps that are shown too.
    """
    main = main_cells(cells)
    load = main[0].load
    plain = {cell.setup.policy: cell for cell in main if cell.run.steps and cell.setup.speculation == "off"}
    traced = list(({cell.setup.policy: cell for cell in main if cell.run.steps} | plain).values())

    def picture(kind: str, title: str, panels: list[Panel], number: str = "") -> Picture:
        return Picture(kind=kind, name=f"{name}-{kind}{number}", title=title, panels=panels)

    yield picture("throughput", f"Throughput and goodput, {load}", plots.throughput(main))
    if traced:
        yield picture("timeline", f"The batch, row by row, {load}", plots.timeline(traced))
    if any("ttft p50" in cell.measured.median for cell in main):
        yield picture("latencies", f"Distributions of latency, {load}", plots.distributions(main))
    for number, curve in enumerate(_curves(cells), 1):
        title = f"Latency against load, from {curve[0].load} to {curve[-1].load}"
        yield picture("load", title, plots.curves(curve), f"-{number}")
    if traced:
        yield picture("batch", f"Batch size and KV cache over time, {load}", plots.occupancy(traced))
    for number, (own, kind) in enumerate(_groupings(cells), 1):
        yield picture("groups", f"Each {kind} apart, {own[0].load}", plots.of_groups(own, kind), f"-{number}")
    if step_seconds and plain:
        yield picture("costs", "What a step costs", plots.step_cost(list(plain.values()), step_seconds))


def _curves(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells that form curves, in the order of their loads, which differ in users only or in rate only."""
    kinds: dict[tuple[float, ...], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.load.users, cell.load.rate)):
        kind = bool(cell.load.users), cell.load.think_seconds, cell.load.burstiness
        kinds.setdefault(kind, []).append(cell)
    return [own for own in kinds.values() if len(by(own, "load")) > 1]
