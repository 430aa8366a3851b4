"""Reports of load tests in the page: whole, and unable to do anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.loadtest.metrics import collect
from shoal.loadtest.records import write_json
from shoal.loadtest.report import write_report
from shoal.loadtest.study import summaries
from tests.e2e.harness import Server
from tests.loadtest.test_report import SLO, a_quick_run, report_of
from tests.page.conftest import HOSTILE

OpenWindow = Callable[..., Any]


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """A folder with what `shoal loadtest` writes, of runs that were made by hand."""
    cells = collect([a_quick_run(policy) for policy in ("static", "fcfs")], [], SLO)
    report = report_of(cells, model=HOSTILE)
    write_report(tmp_path, report)
    write_json(tmp_path / "summary.json", {"made_at": "today", "model": HOSTILE, "cells": summaries(cells)})
    return tmp_path


def test_a_report_of_a_load_test_is_shown(main: Server, window: OpenWindow, reports: Path) -> None:
    page = window(main.url).open("load")
    opened = page.get_by_label("Report of a load test", exact=True)
    shown = page.locator("[aria-label='A load test'] .report")
    texts = []
    for name in ("report.html", "summary.json"):
        opened.set_input_files(reports / name)
        shown.get_by_text(HOSTILE).first.wait_for()
        texts.append(shown.text_content())
    assert all("static" in text and "fcfs" in text for text in texts)
    opened.set_input_files(reports / "report.html")
    shown.locator("img").first.wait_for()
    assert page.evaluate("[...document.querySelectorAll('.report img')].every((one) => one.naturalWidth > 0)")
    for name, text, words in (
        ("other.json", "[]", "no summary"),
        ("bad.json", "{", "bad.json:"),
        ("other.html", "<p>fish</p>", "no report"),
    ):
        opened.set_input_files([{"name": name, "mimeType": "text/plain", "buffer": text.encode()}])
        page.locator("[aria-label='A load test'] [role=alert]").get_by_text(words).wait_for()
    assert page.evaluate("window.hacked") is None


def test_a_hostile_report_does_nothing(main: Server, window: OpenWindow) -> None:
    opened = window(main.url)
    page = opened.open("load")
    page.get_by_label("Policy").wait_for()
    hostile = """<table class="scroll" onclick="window.hacked = 3"><tr>
      <td onmouseover="window.hacked = 4">fish</td></tr></table><script>window.hacked = 5</script>
      <svg onload="window.hacked = 6"><script>window.hacked = 7</script></svg>
      <iframe srcdoc="<script>parent.hacked = 8</script>"></iframe><style>* { display: none }</style>
      <img src="http://192.0.2.1/a.png" onerror="window.hacked = 9"><a href="javascript:window.hacked = 10">link</a>
      <img src="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' onload='parent.hacked = 11'/%3E">
      <object data="data:text/html,x"></object><form action="/v1/engine/loads"><button>send</button></form>
      <base href="http://192.0.2.1/"><meta http-equiv="refresh" content="0; url=http://192.0.2.1/">"""
    page.get_by_label("Report of a load test", exact=True).set_input_files(
        [{"name": "report.html", "mimeType": "text/html", "buffer": (HOSTILE + hostile).encode()}]
    )
    shown = page.locator(".report")
    shown.get_by_text("fish").click()
    shown.get_by_text("link").click()
    names = page.evaluate(
        "[...new Set([...document.querySelectorAll('.report *')].map((one) => one.localName))].sort()"
    )
    assert names == ["b", "img", "table", "tbody", "td", "tr"]
    found = page.evaluate("[...document.querySelectorAll('.report *')].flatMap((one) => one.getAttributeNames())")
    assert set(found) <= {"class", "src", "alt", "tabindex", "role", "aria-label"}
    assert page.evaluate("window.hacked") is None
    assert not [url for url in opened.urls if "192.0.2.1" in url]
    assert page.url == f"{main.url}/#load"
    assert all("Content Security Policy" in fault for fault in opened.faults), "which stops what is only parsed, too"
    opened.faults.clear()
