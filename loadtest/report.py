"""The report of a comparison: tables on the terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from msgspec import Struct

from shoal.loadtest import plots
from shoal.loadtest.costs import CostModel
from shoal.loadtest.metrics import Cell, Slo, baseline, by, generated, groups, speed_up, words
from shoal.loadtest.plan import DEFAULT_USERS
from shoal.loadtest.records import GENERATE, slug
from shoal.terminal import NOTHING

TERMINAL = (
    *("throughput", "goodput", "ttft p50", "ttft p99", "itl p50", "itl p99", "e2e p50", "e2e mean", "e2e p99"),
    *("queueing p50", "batch", "padding share", "kv utilisation", "preemptions", "jain", "errors"),
)
ACROSS_LOADS = (*TERMINAL, "step seconds", "row seconds")
IN_MS = ("p50", "p90", "p99", "mean", "seconds")
IN_PERCENT = ("share", "acceptance rate", "usage", "peak", "utilisation", "cores", "1000")


class Report(Struct, kw_only=True):
    """All that a report says.

    Attributes:
        command: the line that makes the same comparison again.
        complaints: what must not be overlooked.
        differing: workloads in which an answer was not the same in all runs.
        not_simulated: why the twin says nothing of some setups.
        costs: the twin's costs of steps.
    """

    made_at: str
    command: str
    machine: Mapping[str, str]
    model: str
    slo: Slo
    cells: Sequence[Cell]
    complaints: Sequence[str] = ()
    differing: Collection[str] = ()
    not_simulated: Sequence[str] = ()
    costs: CostModel | None = None


class Picture(NamedTuple):
    """A picture as the page shows it; its kind is what is drawn, by which the page has its caption."""

    kind: str
    title: str
    panels: plots.Panels


class Section(NamedTuple):
    """A chapter: pictures by name, the cells of its tables, which fold, and those that most pictures show."""

    name: str
    title: str
    pictures: dict[str, Picture]
    cells: Sequence[Cell] = ()
    main: Sequence[Cell] = ()


def title(name: str) -> str:
    """A figure as people write it, with its unit."""
    return words(name) + (" [ms]" if name.endswith(IN_MS) else " [%]" if name.endswith(IN_PERCENT) else "")


def text(name: str, value: float | None) -> str:
    """A figure's value in the unit of its title: three digits, or all of a large number."""
    if value is None or isinstance(value, int):  # a count
        return NOTHING if value is None else f"{value:,}"
    value *= 1e3 if name.endswith(IN_MS) else 100 if name.endswith(IN_PERCENT) else 1
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".") if value else "0"


def times(name: str, cell: Cell, base: Cell | None) -> str:
    """How many times better than the baseline."""
    ratio = speed_up(name, cell, base)
    return NOTHING if ratio is None else f"{ratio:#.3g}×"  # noqa: RUF001 -- the sign of multiplication


def not_zero(names: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    """The figures that some cell has and that are not 0."""
    return [name for name in names if any(cell.measured.median.get(name) for cell in cells)]


def terminal_tables(cells: Sequence[Cell]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Title and rows of a table for each section and load; columns of nothing but zeros are left out."""
    for section, own in by(cells, "section").items():
        for load, compared in by(own, "load").items():
            names = not_zero(TERMINAL, compared)
            bases = {"static": baseline(compared), GENERATE: generated(compared)}
            yield (
                f"{section}, {load}",
                [
                    {
                        "policy": cell.setup.name,
                        **{
                            f"× {name}": times("throughput", cell, base)  # noqa: RUF001
                            for name, base in bases.items()
                            if base or name == "static"
                        },
                        **{title(name): text(name, cell.measured.median.get(name)) for name in names},
                    }
                    for cell in compared
                ],
            )


# -- the page ----------------------------------------------------------------------------------------------------------


def write_report(folder: Path, report: Report) -> None:
    """Write `report.html`, and the panels of its pictures as SVG files in `pictures/`."""
    sections = list(_sections(report))
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name, picture in ((name, picture) for section in sections for name, picture in section.pictures.items()):
        for number, svg in enumerate(picture.panels.values()):
            (folder / "pictures" / f"{name}-{number}.svg").write_text(svg, "utf-8")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["base64"] = lambda image: b64encode(image.encode()).decode()
    tools: tuple[Callable[..., Any], ...] = (
        baseline,
        by,
        generated,
        names_by_group,
        not_zero,
        text,
        times,
        title,
        words,
    )
    known = {tool.__name__: tool for tool in tools} | {"ACROSS_LOADS": ACROSS_LOADS}
    template = environment.get_template("report.html.j2", globals=known)
    (folder / "report.html").write_text(template.render(report=report, sections=sections), "utf-8")


def names_by_group(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Names of all figures under one load by the clients and priorities whose they are; "" is all requests."""
    names = dict.fromkeys(name for cell in cells for name in cell.measured.median)
    shown = ["", *chain.from_iterable(groups(cells).values())]
    return {group: [name for name in names if name.rpartition(": ")[0] == group] for group in shown}


def _sections(report: Report) -> Iterator[Section]:
    """A section for each workload, and one for the twin's predictions."""
    for number, (section, cells) in enumerate(by(report.cells, "section").items(), 1):
        name = f"{slug(section).lower()}-{number}"
        # Most pictures show the load that compares most setups, or of several the default one.
        main = max(by(cells, "load").values(), key=lambda own: (len(own), own[0].load.users == DEFAULT_USERS))
        pictures = enumerate(_pictures(cells, main, report.costs if number == 1 else None), 1)
        yield Section(
            name=name,
            title=f"Workload {section}",
            pictures={f"{name}-{place}-{picture.kind}": picture for place, picture in pictures},
            cells=cells,
            main=main,
        )
    if predicted := [cell for cell in report.cells if cell.predicted]:
        picture = Picture("twin", "Errors of the digital twin", plots.twin_errors(predicted))
        yield Section("prediction", "Predicted against measured", {"twin": picture})


def _pictures(cells: Sequence[Cell], main: Sequence[Cell], costs: CostModel | None) -> Iterator[Picture]:
    """The pictures of one workload, as far as there is something to draw.

    Args:
        main: the cells of one load, which most pictures show.
        costs: of steps, which are shown too.
    """
    load = main[0].load
    plain = [cell for cell in main if cell.run.steps and cell.setup.speculation == "off"]
    traced = plain or [cell for cell in main if cell.run.steps]
    yield Picture("throughput", f"Throughput and goodput, {load}", plots.throughput(main))
    if traced:
        yield Picture("timeline", f"The batch, row by row, {load}", plots.timeline(traced))
    if any("ttft p50" in cell.measured.median for cell in main):
        yield Picture("latencies", f"Distributions of latency, {load}", plots.distributions(main))
    for is_closed in (True, False):
        own = [cell for cell in cells if bool(cell.load.users) == is_closed]
        if len(by(own, "load")) > 1:
            span = f"from {own[0].load} to {own[-1].load}"
            yield Picture("load", f"Latency against load, {span}", plots.curves(own))
            yield Picture("trade", f"Latency against throughput, {span}", plots.against_throughput(own))
    if traced:
        yield Picture("batch", f"Batch size and KV cache over time, {load}", plots.occupancy(traced))
    for own in by(cells, "load").values():
        for kind, names in groups(own).items():
            yield Picture("groups", f"Each {kind} apart, {own[0].load}", plots.of_groups(own, names))
    if costs and plain:
        yield Picture("costs", "What a step costs", plots.step_cost(plain, costs))
