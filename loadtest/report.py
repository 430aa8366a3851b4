"""The report of a comparison: one HTML file that needs nothing else, and its pictures beside it."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from shoal.loadtest import figures, report_pictures, report_tables
from shoal.loadtest.metrics import is_answered
from shoal.loadtest.plots.style import Picture
from shoal.loadtest.report_data import Cell, ReportData, baseline, by_load, load_name, main_cells
from shoal.loadtest.report_tables import Table

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter: paragraphs, then tables, then pictures, then what is missing."""

    name: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    missing: Sequence[str] = ()


def write_report(folder: Path, report: ReportData) -> Path:
    """Write `report.html`, and the pictures in it as PNGs beside it.

    Returns:
        The path of `report.html`.
    """
    sections = list(_sections(report))
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.image.png)
    path = folder / "report.html"
    path.write_text(_html(report, sections), "utf-8")
    return path


def _html(report: ReportData, sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda image: b64encode(image).decode("ascii")
    return environment.get_template("report.html.j2").render(
        report=report, sections=sections, warnings=list(_warnings(report))
    )


def _warnings(report: ReportData) -> Iterable[str]:
    """What a reader must know before believing anything."""
    for workload, requests in report.differing_texts.items():
        named = ", ".join(requests[:5]) + (", …" if len(requests) > 5 else "")
        yield f"{workload}: the texts of {len(requests)} requests are not the same in all runs ({named})."
    yield from report.warnings
    yield from (problem for cell in report.cells for problem in cell.problems)


def _sections(report: ReportData) -> Iterable[Section]:
    sections = report.sections
    if not sections:
        yield Section("verdict", "The verdict", missing=["No run was measured."])
        return
    yield _overview(report)
    slugs = _slugs(sections)
    for section, cells in sections.items():
        yield _of_section(slugs[section], section, cells, report)
    yield _step_cost(report)
    yield _twin(report)
    yield _generator(report)


def _overview(report: ReportData) -> Section:
    sections = report.sections
    if not any(baseline(cells) for own in sections.values() for cells in by_load(own).values()):
        return Section("verdict", "The verdict", missing=["There is no static baseline to compare with."])
    return Section(
        "verdict",
        "The verdict",
        [sentence for cells in sections.values() if (sentence := _verdict(main_cells(cells)))],
        [
            report_tables.overview(sections, figures.THROUGHPUT),
            report_tables.overview(sections, figures.TTFT[0], lower_is_better=True),
        ],
    )


def _verdict(cells: Sequence[Cell]) -> str:
    """The setup with the most throughput against the baseline."""
    base = baseline(cells)
    best = max(cells, key=lambda cell: cell.measured.median.throughput)
    if base is None or best is base:
        return ""
    where = list(cells).index(best)
    more = report_tables.speed_ups(cells, figures.THROUGHPUT)[where]
    sooner = report_tables.speed_ups(cells, figures.TTFT[0], lower_is_better=True)[where]
    return (
        f"{base.section}, {load_name(base.load)}: {best.setup.name} has {more} the output tokens/s of "
        f"{base.setup.name}, and a median TTFT that is {sooner} lower."
    )


def _of_section(name: str, section: str, cells: Sequence[Cell], report: ReportData) -> Section:
    main = main_cells(cells)
    missing = []
    if len({cell.setup for cell in cells}) == 1:
        missing.append("Only one setup was measured, so that there is nothing to compare it with.")
    if not baseline(main):
        missing.append("Without a static baseline among the setups there are no speed-ups.")
    if not all(map(report_pictures.has_steps, main)):
        names = ", ".join(cell.setup.name for cell in main if not report_pictures.has_steps(cell))
        missing.append(f"No trace of the engine's steps, and so no figures and pictures of its batch: {names}.")
    if not report_pictures.curves(cells):
        missing.append("Curves of latency against load need two loads or more.")
    tables = [report_tables.verdict(main)]
    tables += [report_tables.of_groups(own, read) for _, own, read in report_pictures.groupings(cells)]
    if len(by_load(cells)) > 1:
        tables.append(report_tables.at_each_load(cells))
    return Section(
        name,
        f"Workload {section}",
        [*_description(cells), *_options(cells), _same_work(cells, report)],
        tables,
        list(report_pictures.of_section(name, cells)),
        missing,
    )


def _description(cells: Sequence[Cell]) -> Iterable[str]:
    """How many requests, and of what lengths."""
    answered = [record for record in cells[0].run.requests if is_answered(record)]
    if answered:
        lengths = {
            "prompt": [record.num_prompt_tokens for record in answered],
            "output": [record.num_output_tokens for record in answered],
        }
        yield f"{len(cells[0].run.requests)} requests. " + " ".join(
            "Tokens of {}: median {:.0f}, p90 {:.0f}, at most {}.".format(
                what, *np.quantile(values, (0.5, 0.9)), max(values)
            )
            for what, values in lengths.items()
        )


def _options(cells: Sequence[Cell]) -> Iterable[str]:
    """Options of the servers, each set of them once."""
    for options in dict.fromkeys(cell.setup.options for cell in cells if cell.setup.options):
        yield f"Servers ran with {' '.join(options)}."


def _same_work(cells: Sequence[Cell], report: ReportData) -> str:
    """Whether all that were compared did the same."""
    least = min(cell.measured.least.num_output_tokens for cell in cells)
    most = max(cell.measured.most.num_output_tokens for cell in cells)
    tokens = f"{least:,}" if least == most else f"from {least:,} to {most:,}"
    if sum(cell.measured.num_runs for cell in cells) == 1:
        return f"The run answered with {tokens} output tokens."
    texts = (
        "are NOT all identical"
        if report.differing_texts.get(cells[0].workload)
        else "are identical, request by request"
    )
    verdict = "Same work" if least == most else "NOT the same work"
    return f"{verdict}: every run answered with {tokens} output tokens, and the texts of all runs {texts}."


def _step_cost(report: ReportData) -> Section:
    first = main_cells(next(iter(report.sections.values())))
    picture = report_pictures.step_cost(first, report.step_seconds)
    missing = [] if picture else ["It needs a trace of the engine's steps."]
    if picture and report.step_seconds is None:
        missing.append("There is no cost model to draw beside what was measured.")
    return Section("cost", "What a step costs", pictures=[picture] if picture else [], missing=missing)


def _twin(report: ReportData) -> Section:
    picture = report_pictures.twin_errors(report.cells)
    if picture is None:
        return Section("prediction", "Predicted against measured", missing=["The digital twin was not asked."])
    return Section(
        "prediction",
        "Predicted against measured",
        [
            "The digital twin runs the same scheduler and policies with a virtual clock and costs that were fitted to "
            "a short profile of this machine. What is further off than it should be is marked."
        ],
        [report_tables.twin(report.cells)],
        [picture],
    )


def _generator(report: ReportData) -> Section:
    return Section(
        "generator",
        "What the load generator costs",
        [
            "The load generator shares the machine with the server, so that what it takes is missing there. Under 15% "
            "of a core at 1,000 output tokens/s it is no part of what is measured."
        ],
        [report_tables.generator_cost(report.cells)],
    )


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """Names that are good for files and anchors, and all different."""
    slugs: dict[str, str] = {}
    for name in names:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "workload"
        taken = [other for other in slugs.values() if other == slug or other.startswith(f"{slug}-")]
        slugs[name] = f"{slug}-{len(taken) + 1}" if taken else slug
    return slugs
