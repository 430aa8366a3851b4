"""The planner in the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.e2e.harness import Server
from tests.page.conftest import HOSTILE, wait_until

OpenWindow = Callable[..., Any]


def test_a_plan_follows_the_form(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open("plan")
    page.locator("#plan .tile").first.wait_for()
    for name, value in {"machine": '"h100"', "context": "512", "batch": "4", "pp": "2"}.items():
        field = page.locator("#plan").get_by_label(name, exact=True)
        field.select_option(value) if name == "machine" else field.fill(value)
    page.get_by_role("button", name="Plan", exact=True).click()
    page.get_by_role("heading", name="Splitting: decode, 4 sequences after 512 tokens").wait_for()
    assert page.get_by_text("--machine h100 --context 512 --batch 4 --pp 2").is_visible()
    told = main.post("/v1/engine/plan", machine="h100", context=512, batch=4, pp=2).json()
    titles = page.locator("#plan .tables h2").all_text_contents()
    assert titles == [table["title"] for table in told["tables"]]
    assert page.get_by_role("region", name=titles[-1]).locator("tr").count() == len(told["tables"][-1]["rows"]) + 1
    page.get_by_text("Another model").click()
    page.get_by_role("button", name="An 8-billion-parameter Llama").click()
    wait_until(page, "document.querySelector('#plan .tile dd').textContent.startsWith('8.03 G')")
    assert page.locator("#plan .tile dd").nth(1).text_content().startswith("16.1 GB")


def test_a_config_that_cannot_be_is_named_and_stays_text(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open("plan")
    page.get_by_text("Another model").click()
    problem = page.locator("#plan [role=alert]")
    for config, words in (
        ("{", "this is no JSON"),
        (json.dumps({"model_type": HOSTILE}), HOSTILE[:40]),
        (json.dumps({"model_type": "llama", "hidden_size": -1}), "hidden_size: expected an integer of at least 1"),
    ):
        page.locator("#plan").get_by_label("config.json", exact=True).fill(config)
        page.get_by_role("button", name="Plan", exact=True).click()
        problem.get_by_text(words).wait_for()
    assert page.evaluate("window.hacked") is None
