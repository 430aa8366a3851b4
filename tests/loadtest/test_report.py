"""The report of a comparison: whole, true, and made whatever is missing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
from msgspec.structs import replace

from shoal.loadtest.metrics import Cell, Slo, baseline, by, collect, summarize
from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.report import Report, terminal_tables, write_report
from tests.loadtest.made_runs import COSTS, make_run

VOID = {"meta", "link", "img", "br", "hr", "input"}
SLO = Slo(ttft=0.1, tpot=0.02)


@dataclass
class Page(HTMLParser):
    """A parsed page: its ids, its links, its words and its tables as rows of texts."""

    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [value or "" for name, value in attrs if name in {"href", "action", "data", "srcset"}]
        self.images += [values["src"] or ""] if "src" in values else []
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open) and "small" not in self._open:
            self.rows[-1][-1] += data

    def row(self, label: str, group: str = "all requests") -> dict[str, str]:
        """By setup, the values of the first row of that label below that group heading."""
        columns, current = [""], ""
        for row in self.rows:
            if not row[0]:
                columns = row[1:]
            elif len(row) == 1:
                current = row[0]
            elif (current, row[0]) == (group, label):
                return dict(zip(columns, row[1:], strict=True))
        raise AssertionError(f"there is no row {label} below {group}")


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text("utf-8"))
    page.close()
    assert page._open == []
    return page


def report_of(cells: Sequence[Cell], **changes: object) -> Report:
    report = Report(
        made_at="2026-01-02 03:04 UTC",
        command="shoal loadtest --policies static,fcfs",
        machine={"processor": "two cores"},
        model="shoal-moe",
        slo=SLO,
        cells=cells,
        complaints=[problem for cell in cells for problem in cell.problems],
    )
    return replace(report, **changes)


def made(cells: Sequence[Cell], folder: Path, **changes: object) -> Page:
    write_report(folder, report_of(cells, **changes))
    return read(folder / "report.html")


def a_quick_run(policy: str, **how: int) -> Run:
    """One without a trace: fewer pictures."""
    return replace(make_run(policy, **how), steps=[])


def measured_runs() -> list[Run]:
    runs = [
        make_run(policy, repetition=repetition, noise=0.2)
        for repetition in range(3)
        for policy in ("static", "static-nopad", "fcfs")
    ]
    runs += [make_run(policy, users=16) for policy in ("static", "static-nopad", "fcfs")]
    tenants = ("greedy", "modest")
    return runs + [
        make_run(policy, workload="two-tenants", num_rows=4, client=lambda number: tenants[number % 2])
        for policy in ("fcfs", "fair")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cells = collect(measured_runs(), [make_run("fcfs", noise=0.2), make_run("static", noise=1.5)], SLO)
    write_report(folder, report_of(cells, costs=COSTS))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return read(folder / "report.html")


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(page: Page, folder: Path) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(image.startswith("data:image/svg+xml;base64,") for image in page.images)
    assert "script" not in page.tags and "link" not in page.tags
    assert "url(" not in (folder / "report.html").read_text("utf-8")
    assert (folder / "report.html").stat().st_size < 3_000_000


def test_sections_and_pictures_are_there_and_pictures_come_first(page: Page) -> None:
    chat = ["throughput", "timeline", "latencies", "load", "trade", "batch", "costs"]
    tenants = ["throughput", "timeline", "latencies", "batch", "groups"]
    assert page.ids == [
        *("chat-1", *(f"chat-1-{place}-{name}" for place, name in enumerate(chat, 1))),
        *("two-tenants-2", *(f"two-tenants-2-{place}-{name}" for place, name in enumerate(tenants, 1))),
        *("prediction", "twin", "how"),
    ]
    assert page.tags.count("figcaption") == len(chat) + len(tenants) + 1
    assert page.tags.index("figure") < page.tags.index("table")
    assert page.tags.count("table") == page.tags.count("details") == 4, "for each load, and across the two of chat"


def test_what_was_compared_and_how_to_repeat_it(page: Page) -> None:
    for words in ("shoal-moe", "two cores", "shoal loadtest --policies static,fcfs"):
        assert words in page.text


def test_pictures_are_svg_that_a_telephone_can_show_and_not_blank(page: Page, folder: Path) -> None:
    files = sorted((folder / "pictures").glob("*.svg"))
    assert len(files) == len(page.images)
    images = {b64decode(image.partition(",")[2]).decode() for image in page.images}
    assert images == {file.read_text("utf-8") for file in files}
    for image in images:
        root = ET.fromstring(image)
        assert float(root.attrib["width"].removesuffix("pt")) * 96 / 72 <= 420
        assert image.count("<path") + image.count("<use") > 3
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", image)]
        assert sizes and min(sizes) >= 6, "labels can be read at that width"


def test_a_legend_names_each_line_once(page: Page, folder: Path) -> None:
    legends = [file for file in (folder / "pictures").glob("*-0.svg") if "throughput" not in file.name]
    assert len(legends) > 5
    for file in legends:
        labels = re.findall(r"<text [^>]*>([^<]+)</text>", file.read_text("utf-8"))
        assert len(labels) == len(set(labels)) > 0
    for file in (folder / "pictures").glob("chat-1-3-latencies-[1-3].svg"):
        assert "static" not in file.read_text("utf-8")


# -- the figures -------------------------------------------------------------------------------------------------------


def test_the_table_of_a_workload_holds_the_medians(page: Page) -> None:
    runs = [run for run in measured_runs() if run.workload == "chat" and run.load.users == 8]
    middle = [
        sorted(summarize(run, SLO)["throughput"] for run in runs if run.setup.policy == policy)[1]
        for policy in ("static", "static-nopad", "fcfs")
    ]
    assert list(page.row("tokens/s").values()) == [f"{value:,.0f}" for value in middle]
    better = list(page.row("tokens/s", "times better than static").values())
    assert better == [f"{value / middle[0]:.2f}×" for value in middle]  # noqa: RUF001


def test_both_baselines_are_told_apart(tmp_path: Path) -> None:
    """Hugging Face's `generate` is no engine of ours, and has no trace."""
    people = replace(make_run("static"), setup=Setup(policy="hf-generate"), steps=[])
    for record in people.requests:
        record.token_times = [record.finished_at or 0.0]
    cells = collect([a_quick_run("static"), a_quick_run("fcfs"), people])
    assert cells[2].problems == []
    ((_, rows),) = terminal_tables(cells)
    assert [row["× hf-generate"] == "1.00×" for row in rows] == [True, False, True]  # noqa: RUF001
    assert [row["× static"] == "1.00×" for row in rows] == [True, False, True]  # noqa: RUF001
    ((_, rows),) = terminal_tables(cells[:2])
    assert "× hf-generate" not in rows[0]  # noqa: RUF001
    page = made(cells, tmp_path)
    assert page.row("tokens/s", "times better than hf-generate") == page.row("tokens/s", "times better than static")
    assert "the output tokens/s of hf-generate: Hugging Face's generate on padded batches" in page.text
    assert "hf-generate" not in made(cells[:2], tmp_path).text


def test_loads_stand_side_by_side(page: Page) -> None:
    table = page.rows[: page.rows.index(["", "static", "static-nopad", "fcfs"])]
    assert table[0] == ["", "8 users", "16 users"]
    values = {}
    for users in (8, 16):
        runs = [run for run in measured_runs() if run.workload == "chat" and run.load.users == users]
        seconds = [summarize(run, SLO)["row seconds"] for run in runs if run.setup.policy == "fcfs"]
        values[users] = f"{1000 * sorted(seconds)[len(seconds) // 2]:#.3g}"
    heading = table.index(["row seconds [ms]"])
    assert ["fcfs", values[8], values[16]] in table[heading : heading + 4]


def test_the_first_token_of_a_static_batch_is_explained(page: Page) -> None:
    assert "is full or has waited for 0.5 s (static_timeout_seconds)" in page.text


def test_pictures_show_the_load_that_is_compared_most(tmp_path: Path) -> None:
    def titles(*runs: Run) -> str:
        return made(collect(runs, (), SLO), tmp_path).text

    few = [a_quick_run(policy, users=4, num_requests=4) for policy in ("fcfs", "static")]
    assert "Throughput and goodput, 4 users" in titles(*few, a_quick_run("fcfs", users=32))
    many = [a_quick_run(policy, users=32) for policy in ("fcfs", "static")]
    assert "Throughput and goodput, 32 users" in titles(*few, *many)


def test_the_range_over_repetitions_is_below_the_median(folder: Path) -> None:
    runs = [run for run in measured_runs() if run.setup.policy == "fcfs" and run.load.users == 8]
    values = sorted(summarize(run, SLO)["throughput"] for run in runs if run.workload == "chat")
    expected = f"<td>{values[1]:,.0f}<small>{values[0]:,.0f} to {values[2]:,.0f}</small></td>"
    assert expected in (folder / "report.html").read_text("utf-8")


def test_an_exact_table(tmp_path: Path) -> None:
    """Two requests at once, of two and four tokens that come every quarter of a second after the first half."""
    run = replace(make_run("fcfs", num_requests=2), steps=[])
    for record, num_tokens in zip(run.requests, (2, 4), strict=True):
        record.num_output_tokens = num_tokens
        record.token_times = [0.5 + 0.25 * i for i in range(num_tokens)]
        record.finished_at = record.token_times[-1]
    page = made(collect([run], (), SLO), tmp_path)
    expected = {
        "tokens/s": "4.80",
        "TTFT p50 [ms]": "500",
        "TTFT p99 [ms]": "500",
        "ITL p50 [ms]": "250",
        "end-to-end p50 [ms]": "1,000",
        "goodput share [%]": "0",
        "requests": "2",
        "request rate": "1.60",
    }
    assert {label: page.row(label)["fcfs"] for label in expected} == expected


def test_predictions_stand_below_and_what_is_far_off_is_marked(page: Page, folder: Path) -> None:
    errors = page.row("tokens/s", "error of the prediction, and below it: predicted / measured")
    assert errors["static-nopad"] == "–"  # noqa: RUF001
    assert float(errors["static"].rstrip("%")) < -9
    assert re.search(rf'class="alarm">{re.escape(errors["static"])}<', (folder / "report.html").read_text("utf-8"))
    assert f"<td>{errors['fcfs']}<" in (folder / "report.html").read_text("utf-8")


def test_each_client_has_rows_of_its_own(page: Page) -> None:
    (run,) = (run for run in measured_runs() if run.setup.policy == "fair")
    expected = summarize(run, SLO)["client modest: throughput"]
    assert page.row("tokens/s", "client modest")["fair"] == f"{expected:#.3g}".rstrip(".")


def test_the_same_work_is_said(page: Page) -> None:
    tokens = sum(record.num_output_tokens for record in make_run("fcfs").requests)
    assert f"Same work: every run answered with {tokens:,} output tokens" in page.text
    assert "NOT" not in page.text and "Before believing" not in page.text


def test_different_work_is_said_loudly(tmp_path: Path) -> None:
    runs = [a_quick_run("static"), a_quick_run("fcfs")]
    runs[1].requests[3].num_output_tokens += 5
    page = made(collect(runs, (), SLO), tmp_path, differing={"chat"}, complaints=["It rained."])
    for words in (
        "NOT the same work",
        "NOT all identical",
        "It rained.",
    ):
        assert words in page.text


def test_names_are_escaped(tmp_path: Path) -> None:
    run = make_run("a<b>&c", workload="<w>", client=lambda number: "<i>x" if number % 2 else "y")
    page = made(collect([run], (), SLO), tmp_path, model="<script>alert(1)</script>", command="a && b < c")
    assert "script" not in page.tags and "i" not in page.tags and "w" not in page.tags
    for words in ("<script>alert(1)</script>", "a && b < c", "a<b>&c", "Workload <w>", "<i>x"):
        assert words in page.text
    assert (tmp_path / "pictures" / "w-1-1-throughput-0.svg").exists()


# -- whatever is missing -----------------------------------------------------------------------------------------------


def test_no_run_at_all(tmp_path: Path) -> None:
    assert "No run was measured." in made([], tmp_path).text


def test_one_policy_alone(tmp_path: Path) -> None:
    page = made(collect([a_quick_run("fcfs")], (), SLO), tmp_path)
    for words in ("no static baseline", "twin was not asked"):
        assert words in page.text


def test_a_run_that_broke_off_counts_only_where_there_is_no_other(tmp_path: Path) -> None:
    whole, broken = a_quick_run("static"), a_quick_run("static", repetition=1)
    broken.is_complete = False
    for record in broken.requests[20:]:
        record.finished_at = None
    alone = a_quick_run("fcfs", repetition=1)
    alone.is_complete = False
    cells = collect([broken, whole, alone], (), SLO)
    assert [cell.measured.num_runs for cell in cells] == [1, 1]
    assert cells[0].run is whole and cells[1].run is alone
    page = made(cells, tmp_path)
    assert "chat, 8 users, static, repetition 2 broke off: 20 requests had been answered." in page.text
    assert "chat, 8 users, fcfs, repetition 2 broke off: 40 requests had been answered." in page.text


def test_errors_only_and_no_steps(tmp_path: Path) -> None:
    run = make_run("static")
    run.steps = []
    for record in run.requests:
        record.error, record.token_times, record.finished_at = "connection <refused>", [], None
    page = made(collect([run, a_quick_run("fcfs")], (), SLO), tmp_path)
    assert "40 of 40 requests were not answered, most often: connection <refused>." in page.text
    assert "chat, 8 users, fcfs, repetition 1: there is no trace of the engine's steps." in page.text
    assert page.row("TTFT p50 [ms]")["static"] == "–"  # noqa: RUF001
    run_alone = made(collect([run], (), SLO), tmp_path / "alone")
    assert run_alone.ids == ["warnings", "chat-1", "chat-1-1-throughput", "how"]


# -- putting runs together ---------------------------------------------------------------------------------------------


def test_cells_are_in_one_order_of_setups_whatever_ran_first() -> None:
    order = [("static", 8), ("fcfs", 8), ("fcfs", 16), ("static", 16)]
    cells = collect([make_run(policy, users=users) for policy, users in order])
    assert [(cell.setup.policy, cell.load.users) for cell in cells] == [
        ("static", 8),
        ("fcfs", 8),
        ("static", 16),
        ("fcfs", 16),
    ]


def test_servers_with_other_options_have_a_section_of_their_own() -> None:
    common, few = ("--threads", "1"), ("--threads", "1", "--max-num-seqs", "2")
    made = [make_run(policy, users=2, num_requests=4) for policy in ("static", "fcfs")]
    runs = [replace(run, setup=replace(run.setup, options=options)) for run in made for options in (common, few)]
    cells = collect(runs)
    sections = by(cells, "section")
    assert list(sections) == ["chat", "chat, --max-num-seqs 2"]
    assert all(baseline(own) is own[0] and len(own) == 2 for own in sections.values())
    assert "chat, --max-num-seqs 2, 2 users" in dict(terminal_tables(cells))
    assert set(by(collect(made), "section")) == {"chat"}


def test_the_baseline_is_static_with_its_padding_rows_if_it_is_there() -> None:
    cells = collect([make_run(policy) for policy in ("fcfs", "static-nopad", "static")])
    assert baseline(cells) is cells[2]
    assert baseline(cells[:2]) is cells[1]
    assert baseline(cells[:1]) is None
    assert baseline(collect([make_run("static", speculation="draft")])) is None


def test_a_prediction_belongs_to_its_combination_whatever_the_seed() -> None:
    predicted = make_run("fcfs", repetition=7)
    other = make_run("fcfs", users=9)
    (cell,) = collect([make_run("fcfs")], [predicted, other])
    assert cell.predicted == summarize(predicted)


def test_closed_and_open_loops_have_curves_of_their_own(tmp_path: Path) -> None:
    loads = [Load(users=8), Load(users=4), Load(rate=5), Load(rate=9)]
    run = a_quick_run("fcfs", num_requests=4)
    page = made(collect([replace(run, load=load) for load in loads]), tmp_path)
    for words in ("from 4 users to 8 users", "from 5 requests/s to 9 requests/s"):
        for axis in ("load", "throughput"):
            assert f"Latency against {axis}, {words}" in page.text
