"""`python -m tests.page.screenshots [FOLDER]` makes the pictures of docs/page.md: each view at three widths.

It starts a server of its own with the bundled model, and needs what the tests here need, and Pillow.
"""

from __future__ import annotations

import io
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.e2e.harness import Server
from tests.page.conftest import find_browser, wait_until

SIZES = {400: (400, 860), 1280: (1280, 900), 3840: (3840, 2160)}
MOST_BYTES = 150_000
MOST_WIDTH = 1440  # of a picture; what is wider is made smaller
ASK = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"


def save(shot: bytes, path: Path) -> None:
    """Write a picture with as many colours as its size allows."""
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    if picture.width > MOST_WIDTH:
        picture = picture.resize((MOST_WIDTH, picture.height * MOST_WIDTH // picture.width), Image.Resampling.LANCZOS)
    picture.save(path, optimize=True)
    for num_colours in (256, 128, 64):
        if path.stat().st_size <= MOST_BYTES:
            return
        picture.quantize(num_colours, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def show_playground(page: Any, server: Server) -> None:
    page.get_by_role("button", name="Complete").click()
    page.get_by_role("button", name="Compare").click()
    for pane in page.locator(".pane").all():
        pane.locator(".side > summary").click()
        pane.get_by_label("max_tokens").fill("64")
        pane.get_by_label("temperature").fill("0.4")
        pane.get_by_label("seed").fill("7")
    page.locator(".pane").nth(1).get_by_label("speculation").select_option('"off"')
    for pane in page.locator(".pane").all():
        pane.locator(".side > summary").click()
    page.get_by_label("Your text").fill(ASK)
    page.get_by_role("button", name="Send").click()
    wait_until(page, "document.querySelectorAll('.figures').length === 2 && [...document.querySelectorAll("
                           "'.figures')].every((one) => one.textContent.includes('end '))")  # fmt: skip


def load(server: Server, **body: Any) -> None:
    server.until("no load runs", lambda: all(one["state"] != "running" for one in loads(server)))
    server.wait_idle()
    assert server.post("/v1/engine/loads", **body).status_code == 200


def loads(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/v1/engine/loads").json()["data"]
    return found


def show_engine(page: Any, server: Server) -> None:
    wait_until(page, "document.querySelector('.time output').textContent.startsWith('live')")
    load(server, workload="shared", users=30, seconds=30)
    page.wait_for_timeout(8000)
    page.get_by_role("button", name="Pause").click()
    page.locator(".queue button.id, [aria-label=Batch] button.id").first.wait_for(state="attached")
    page.locator("[aria-label='Lives of requests'] canvas").click(position={"x": 40, "y": 100})
    page.mouse.move(2, 2)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(300)


def show_load(page: Any, server: Server) -> None:
    if {one["policy"] for one in loads(server) if one["workload"] == "mixed"} != {"static", "fcfs"}:
        for policy in ("static", "fcfs"):
            load(server, workload="mixed", users=24, seconds=8, policy=policy)
        server.until("both loads end", lambda: all(one["state"] != "running" for one in loads(server)))
    wait_until(page, "document.querySelectorAll('.run').length === 2")
    for chip in page.locator(".chips button", has_text="mixed").all():
        if chip.get_attribute("aria-pressed") == "false":
            chip.click()
    page.wait_for_timeout(800)


def show_plan(page: Any, server: Server) -> None:
    page.locator("#plan .tile").first.wait_for()
    page.get_by_text("Another model").click()
    page.get_by_role("button", name="An 8-billion-parameter Llama").click()
    wait_until(page, "document.querySelector('#plan .tile dd').textContent.startsWith('8.03 G')")
    page.get_by_text("Another model").click()


SHOWS = {"playground": show_playground, "load": show_load, "engine": show_engine, "plan": show_plan}


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    options = ("--speculation", "draft", "--num-spec-tokens", "3", "--max-num-seqs", "24", "--num-blocks", "640")
    with (
        tempfile.TemporaryDirectory() as temp,
        closing(Server(Path(temp), *options, port=0)) as server,
        sync_playwright() as playwright,
    ):
        server.wait_ready()
        browser = playwright.chromium.launch(executable_path=find_browser(playwright), args=["--no-sandbox"])
        for view, show in SHOWS.items():
            for width, (wide, high) in SIZES.items():
                theme = "light" if width == 400 or (view == "load" and width == 1280) else "dark"
                context = browser.new_context(viewport={"width": wide, "height": high}, color_scheme=theme)
                page = context.new_page()
                page.goto(f"{server.url}/#{view}")
                show(page, server)
                save(page.screenshot(), folder / f"{view}-{width}.png")
                context.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "page"))
