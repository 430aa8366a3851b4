"""The page in a browser: to talk, to compare, to stop time and step back, and to survive what happens to the server."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, Waiting
from tests.page.cable import Cable
from tests.page.conftest import HOSTILE, wait_until

OpenWindow = Callable[..., Any]

SERIOUS = ("serious", "critical")


def talk(page: Any, text: str, *, max_tokens: int = 24, **settings: str) -> None:
    """Send a text, and wait until all answers have ended."""
    page.get_by_label("max_tokens").first.wait_for(state="attached")
    for pane in page.locator(".pane").all():
        if not pane.get_by_label("max_tokens").is_visible():
            pane.locator(".side > summary").click()
        pane.get_by_label("max_tokens").fill(str(max_tokens))
        for name, value in settings.items():
            pane.get_by_label(name, exact=True).fill(value)
    page.get_by_label("Your text").fill(text)
    page.get_by_role("button", name="Send").click()
    ended(page)


def ended(page: Any) -> None:
    wait_until(
        page,
        "document.querySelectorAll('.pane').length === [...document.querySelectorAll('.pane')].filter("
        "(pane) => [...pane.querySelectorAll('.figures')].at(-1)?.textContent.includes('end ')).length",
    )


def answers(page: Any) -> list[str]:
    return page.locator(".assistant .text").all_text_contents()


# -- the playground ----------------------------------------------------------------------------------------------------


def test_an_answer_comes_with_its_figures_and_probabilities(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    talk(page, "Write a function that reverses a string.", temperature="0")
    (text,) = answers(page)
    assert (
        text
        == main.chat("Write a function that reverses a string.", temperature=0, max_tokens=24)["choices"][0]["message"][
            "content"
        ]
    )
    figures = page.locator(".figures").text_content()
    assert "tokens/s" in figures and "first token" in figures and re.search(r"tokens \d+ \+ \d+", figures)
    page.locator(".assistant .token").first.hover()
    tip = page.get_by_role("tooltip")
    tip.wait_for()
    assert "%" in tip.text_content()
    assert tip.locator("tr").count() >= 5


def test_a_conversation_goes_on_is_edited_and_outlives_the_page(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    talk(page, "first", temperature="0")
    talk(page, "second", temperature="0")
    assert page.locator(".user .text").all_text_contents() == ["first", "second"]
    before = answers(page)
    page.reload()
    page.locator(".assistant .text").nth(1).wait_for()
    assert answers(page) == before
    page.get_by_role("button", name="Edit").first.click()
    assert page.get_by_label("Your text").input_value() == "first"
    assert answers(page) == []


def test_an_answer_is_made_again_and_stopped(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    talk(page, "Tell me of fish.", seed="5")
    (first,) = answers(page)
    page.get_by_role("button", name="Again").click()
    ended(page)
    assert answers(page) == [first], "the seed is the same"
    page.get_by_label("max_tokens").fill("800")
    page.get_by_text("All parameters").click()
    page.get_by_label("ignore_eos").select_option("true")
    page.get_by_role("button", name="Again").click()
    page.locator(".token").nth(30).wait_for()
    page.get_by_role("button", name="Stop").click()
    ended(page)
    assert "stopped" in page.locator(".figures").text_content()
    main.wait_idle()


def test_two_panes_say_whether_their_texts_are_the_same(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    page.get_by_role("button", name="Compare").click()
    talk(page, "Write a function that adds two numbers.")
    one, other = answers(page)
    assert one == other
    assert "The texts are the same" in page.locator(".verdict").text_content()
    page.locator(".pane").nth(1).get_by_label("temperature").fill("2")
    page.get_by_role("button", name="Again").first.click()
    ended(page)
    one, other = answers(page)
    assert one != other
    said = re.fullmatch(r"The texts part after (\d+) characters?\.", page.locator(".verdict").text_content())
    assert said
    at = int(said[1])
    assert one[:at] == other[:at] and one[at : at + 1] != other[at : at + 1]
    assert page.locator(".token.turning").count() >= 1


def test_drafted_tokens_have_colours(start: StartServer, window: OpenWindow) -> None:
    """Suffix decoding drafts what a text of one cycle repeats, and is right."""
    server = start("--speculation", "suffix", "--num-spec-tokens", "3").wait_ready()
    page = window(server.url).open()
    page.get_by_role("button", name="Complete").click()
    talk(page, "the cat sat on the mat and the cat sat on the mat and", max_tokens=300, temperature="0")
    assert page.locator(".token.kept").count() >= 1
    assert "drafts kept" in page.locator(".figures").text_content()


def test_structured_output_and_tools(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    page.get_by_label("The answer is").select_option("choice")
    page.get_by_label("Pattern or choices").fill("herring\nsprat")
    talk(page, "Which fish?")
    assert answers(page)[-1] in ("herring", "sprat")
    page.get_by_label("The answer is").select_option("schema")
    page.get_by_label("Schema", exact=True).fill(
        '{"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}'
    )
    talk(page, "How many?", max_tokens=60)
    assert re.sub(r"\s", "", answers(page)[-1]) == '{"n":7}'
    page.get_by_label("Schema", exact=True).fill("{")
    page.get_by_label("Your text").fill("again")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Schema: this is no JSON").wait_for()


def test_a_tool_is_called_and_its_result_told(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    page.get_by_label("max_tokens").wait_for()
    page.get_by_text("Tools", exact=True).click()
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Kiel"]}}}}
    function["parameters"]["required"] = ["city"]
    page.get_by_label("Tools, as JSON").fill(json.dumps([{"type": "function", "function": function}]))
    page.get_by_label("The model has to call one").check()
    talk(page, "How is it?", max_tokens=80)
    assert re.sub(r"\s", "", page.locator(".assistant pre").text_content()) == 'weather({"city":"Kiel"})'
    page.get_by_label("The model has to call one").uncheck()
    page.get_by_label("Result of weather").fill(HOSTILE)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_role("button", name="Tell the model").click()
    ended(page)
    *_, call, result = asked.value.post_data_json["messages"]
    assert (call["role"], call["tool_calls"][0]["function"]["name"]) == ("assistant", "weather")
    assert result == {"role": "tool", "content": HOSTILE, "tool_call_id": call["tool_calls"][0]["id"]}
    assert page.locator(".message").count() == 4
    page.reload()
    page.locator(".assistant pre").wait_for()
    assert page.locator(".message.user .text").all_text_contents() == ["How is it?", HOSTILE]
    assert page.get_by_label("Tools, as JSON").input_value().startswith("[")
    page.get_by_role("button", name="Edit").click()
    assert page.locator(".message").count() == 0
    assert page.evaluate("window.hacked") is None


def test_what_the_server_refuses_is_told_in_its_words(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    page.get_by_label("max_tokens").wait_for()
    page.get_by_label("temperature").fill("5")
    page.get_by_label("Your text").fill("hot")
    page.get_by_role("button", name="Send").click()
    page.locator(".assistant .bad").wait_for()
    assert "temperature" in page.locator(".assistant .bad").text_content()


def test_the_request_as_code(main: Server, window: OpenWindow) -> None:
    page = window(main.url).open()
    page.get_by_label("max_tokens").fill("9")
    page.get_by_label("Your text").fill("it's here")
    page.get_by_role("button", name="Code").click()
    code = page.get_by_label("The request", exact=True)
    assert "/v1/chat/completions" in code.text_content() and "it'\\''s here" in code.text_content()
    page.get_by_role("button", name="Python").click()
    text = code.text_content()
    compile(text, "request", "exec")
    assert "max_tokens=9" in text
    page.get_by_role("button", name="JSON").click()
    assert '"max_tokens": 9' in code.text_content()


def test_hostile_text_stays_text(main: Server, window: OpenWindow) -> None:
    opened = window(main.url)
    page = opened.open()
    page.get_by_label("System prompt").fill(HOSTILE)
    page.get_by_label("Stop strings").fill("<i>" + HOSTILE)
    page.get_by_label("The answer is").select_option("choice")
    page.get_by_label("Pattern or choices").fill(HOSTILE)
    talk(page, HOSTILE, max_tokens=80)
    assert page.locator(".user .text").text_content() == HOSTILE
    assert answers(page) == [HOSTILE]
    page.reload()
    page.locator(".assistant .text").wait_for()
    assert answers(page) == [HOSTILE]
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main b:has-text('bold')").count() == 0


# -- the engine --------------------------------------------------------------------------------------------------------


def busy(page: Any, users: int = 6, seconds: float = 60, workload: str = "mixed") -> None:
    """Let a load come, and wait until the batch moves."""
    page.evaluate(
        """(body) => fetch('v1/engine/loads', { method: 'POST', headers: { 'content-type': 'application/json' },
             body: JSON.stringify(body) })""",
        {"users": users, "seconds": seconds, "workload": workload},
    )
    wait_until(page, "/Step [1-9]\\d*.*: [1-9]/.test(document.querySelector('[aria-label=Batch] .faint').textContent)")


def shown_step(page: Any) -> int:
    page.evaluate("new Promise(requestAnimationFrame)")  # what was asked for is drawn with the next frame
    page.evaluate("new Promise(requestAnimationFrame)")
    return int(re.search(r"step (-?\d+)", page.locator(".time output").text_content())[1])


def test_time_is_stopped_scrubbed_and_stepped(start: StartServer, window: OpenWindow) -> None:
    server = start("--max-num-seqs", "4").wait_ready()
    page = window(server.url).open("engine")
    busy(page)
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Pause").click()
    stopped = shown_step(page)
    wait_until(
        page,
        "Number(document.querySelector('.time input[type=range]').max) > "
        "Number(document.querySelector('.time input[type=range]').value) + 20",
    )
    assert shown_step(page) == stopped
    told = page.locator("[aria-label=Batch] .faint").first.text_content()
    assert re.match(rf"Step {stopped}.*: [1-4] rows?, \d+ tokens?", told)
    steps = []
    for _ in range(10):
        page.get_by_role("button", name="One step on").click()
        steps.append(shown_step(page))
    assert steps[1:] == list(range(steps[1], steps[1] + 9)), "after a pause steps are told of one by one"
    page.get_by_role("button", name="One step back").click()
    assert shown_step(page) == steps[-2]
    page.locator("body").press("ArrowLeft")
    assert shown_step(page) == steps[-3]
    slider = page.get_by_role("slider", name="Time")
    slider.fill("0")
    assert shown_step(page) < stopped
    page.get_by_role("button", name="Go live").click()
    wait_until(
        page, f"Number(document.querySelector('.time output').textContent.match(/step (\\d+)/)[1]) > {stopped + 20}"
    )


def test_a_request_is_found_and_its_life_told(start: StartServer, window: OpenWindow) -> None:
    server = start("--max-num-seqs", "1").wait_ready()
    page = window(server.url).open("engine")
    page.get_by_text("Nothing runs.").wait_for()
    first = Waiting(server, "/v1/completions", prompt="the cat", max_tokens=2000)
    second = Waiting(server, "/v1/completions", prompt="the cat", max_tokens=2000)
    ids = [f"{one.answer().json()['id']}-0-0" for one in (first, second)]
    wait_until(page, "document.querySelector('[aria-label=\"Waiting queue\"] .faint').textContent === 'nobody waits'")
    page.get_by_label("Find a request").fill(ids[1])
    page.get_by_role("button", name="Go to its start").click()
    life = page.get_by_label("The life of the chosen request")
    life.get_by_text("decoded").first.wait_for()
    texts = [page.get_by_label("The life of the chosen request").text_content()]
    page.get_by_label("Find a request").fill(ids[0])
    page.get_by_role("button", name="Go to its start").click()
    wait_until(
        page, f"document.querySelector('[aria-label=\"Lives of requests\"] .faint').textContent.startsWith('{ids[0]}')"
    )
    texts.append(life.text_content())
    assert any("waited: all rows were taken" in text for text in texts)
    assert page.get_by_role("button", name="Go live").is_visible()


def test_a_block_tells_whose_it_is_and_what_it_holds(start: StartServer, window: OpenWindow) -> None:
    server = start("--max-num-seqs", "2").wait_ready()
    page = window(server.url).open("engine")
    waiting = Waiting(server, "/v1/completions", prompt="the cat sat " * 20, max_tokens=12000)
    wait_until(
        page, "/[1-9]\\d* blocks? owned/.test(document.querySelector('[aria-label=\"Block pool\"] .faint').textContent)"
    )
    page.wait_for_timeout(1000)  # block tables come twice a second
    os.kill(server.engine_pid(), signal.SIGSTOP)
    pool = page.locator("[aria-label='Block pool'] canvas")
    pool.hover(position={"x": 4, "y": 4})
    tip = page.get_by_role("tooltip")
    tip.get_by_text("the cat sat").wait_for()
    assert "Block 0: row 0" in tip.text_content() and "tokens 0 to" in tip.text_content()
    pool.focus()
    page.keyboard.press("ArrowRight")
    page.locator("[aria-label='Block pool'] [role=status]", has_text="Block 1: row 0").wait_for(state="attached")
    os.kill(server.engine_pid(), signal.SIGCONT)
    waiting.answer()


def test_the_page_goes_on_with_the_next_engine(start: StartServer, window: OpenWindow) -> None:
    server = start().wait_ready()
    page = window(server.url).open("engine")
    busy(page)
    os.kill(server.engine_pid(), signal.SIGKILL)
    page.get_by_text("The engine has died.").wait_for()
    wait_until(page, "document.querySelector('.notice').hidden")
    before = shown_step(page)
    wait_until(
        page, f"Number(document.querySelector('.time output').textContent.match(/step (-?\\d+)/)?.[1]) !== {before}"
    )
    assert server.metric("shoal:engine_restarts_total") == 1


def test_a_cut_stream_goes_on_where_it_was(start: StartServer, window: OpenWindow) -> None:
    server = start().wait_ready()
    with Cable(server.port) as cable:
        page = window(f"http://127.0.0.1:{cable.port}").open("engine")
        asked: list[str | None] = []
        page.on("request", lambda request: asked.append(request.headers.get("last-event-id")))
        busy(page)
        cable.cut()
        page.get_by_text("The stream was cut").wait_for()
        cable.mend()
        wait_until(page, "document.querySelector('.notice').hidden")
    assert any(re.fullmatch(r"\w+:\d+", one or "") for one in asked)


def test_the_engine_is_watched_only_while_somebody_looks(main: Server, window: OpenWindow) -> None:
    opened = window(main.url)
    page = opened.open("playground")
    page.get_by_label("max_tokens").wait_for()
    assert not [url for url in opened.urls if url.endswith("/v1/engine/events")]
    with page.expect_request("**/v1/engine/events"):
        page.get_by_role("link", name="Engine").click()
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/v1/engine/events")):
        page.get_by_role("link", name="Playground").click()


def test_memory_stays_flat(start: StartServer, window: OpenWindow) -> None:
    """What is kept is bounded, however long the page is open: as after a night."""
    page = window(start().wait_ready().url).open("engine")
    busy(page)
    kept = page.evaluate(
        """async () => {
             const { Feed } = await import('./page/feed.js');
             const feed = new Feed();
             const row = (id, n) => [n % 8, id, 'decode', 10, 20, 30, 12, 1, 0, 0, 0, 0, 1.0];
             for (let n = 0; n < 60000; n += 1) {
               const step = { number: n, num_steps: 1, num_tokens: 1, policy: 'fcfs', batch: [row(`r${n >> 3}`, n)],
                 waiting: [], num_waiting: 0, preempted: {}, num_blocks: 8, num_owned_blocks: 1, blocks_per_cell: 1,
                 blocks: '0.......', tables: { [`r${n >> 3}`]: [0] }, num_prefix_queries: 0, num_prefix_hits: 0,
                 num_draft_tokens: 0, num_accepted_tokens_per_pos: [], seconds: 0.04, num_output_tokens: 1, joined: [],
                 left: [], parts: null, experts: null };
               feed.take({ event: 'step', data: JSON.stringify({ at: 1000 + n / 25, engine: 1, step }), id: `a:${n}` });
             }
             return [feed.entries.length, feed.lives.all.size, feed.lives.open.size, feed.tables.size];
           }"""
    )
    entries, lives, unfinished, tables = kept
    assert entries <= 5000 and lives <= 400 and unfinished <= 2 and tables <= 400


# -- the load ----------------------------------------------------------------------------------------------------------


def test_two_loads_stand_side_by_side(start: StartServer, window: OpenWindow) -> None:
    server = start("--max-num-seqs", "4").wait_ready()
    page = window(server.url).open("load")
    page.get_by_label("Policy").wait_for()
    for policy in ("fcfs", "static"):
        page.get_by_label("Users").fill("4")
        page.get_by_label("Seconds").fill("1")
        page.get_by_label("Policy").select_option(policy)
        page.get_by_role("button", name="Start").click()
        page.locator(f"[aria-label='Run under {policy}']").get_by_text("finished after").wait_for()
        server.wait_idle()
    assert page.locator(".run").count() == 2
    assert page.locator(".run dd").first.text_content() != "0"


# -- all of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "theme"), [(400, "light"), (1280, "light"), (1280, "dark")])
@pytest.mark.parametrize("view", ["playground", "engine", "load", "plan"])
def test_nothing_keeps_people_out(
    main: Server, window: OpenWindow, axe: str, view: str, *, width: int, theme: str
) -> None:
    """axe finds nothing serious, and nothing is wider than the window."""
    page = window(main.url, viewport={"width": width, "height": 900}, color_scheme=theme, bypass_csp=True).open(view)
    if view == "playground":
        page.get_by_role("button", name="Compare").click()
        talk(page, "hello")
    elif view == "engine":
        busy(page, seconds=3)
        page.get_by_role("button", name="Pause").click()
        page.get_by_text("The step as a table").click()
    elif view == "plan":
        page.locator("#plan .tile").first.wait_for()
        page.get_by_text("Another model").click()
    else:
        page.get_by_label("Seconds").fill("1")
        page.get_by_role("button", name="Start").click()
        page.locator(".run").first.wait_for()
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    serious = [
        f"{one['id']}: {one['nodes'][0]['html'][:200]} {one['nodes'][0].get('failureSummary', '')}"
        for one in found["violations"]
        if one["impact"] in SERIOUS
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_comes_from_this_server(main: Server, window: OpenWindow) -> None:
    opened = window(main.url)
    page = opened.open("engine")
    page.get_by_text("Batch").first.wait_for()
    assert {re.match(r"https?://[^/]+|data:", url)[0] for url in opened.urls} <= {main.url, "data:"}
    sizes = page.evaluate(
        "performance.getEntriesByType('resource').filter((one) => one.name.includes('/page/'))"
        ".map((one) => one.decodedBodySize)"
    )
    assert 0 < sum(sizes) < 300 * 1024


def test_a_key_is_asked_for_and_kept_in_the_tab(start: StartServer, window: OpenWindow) -> None:
    server = start("--api-keys", "a-key")
    server.http.headers["authorization"] = "Bearer a-key"
    server.wait_ready()
    page = window(server.url).open("engine")
    page.get_by_text("This server asks for a key").wait_for()
    page.get_by_label("API key").fill("a-key")
    page.get_by_role("button", name="Use it").click()
    page.locator("#status", has_text="parameters").wait_for()
    page.get_by_text("Nothing runs.").wait_for()
    assert page.evaluate("localStorage.getItem('shoal-key')") is None
