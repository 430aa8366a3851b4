"""The language of injected faults, which request meets which, and what becomes of the messages of an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from shoal.scheduler.errors import ConfigError
from shoal.server.faults import CONDITIONS, FAULTS, MAX_SERIES, RANGES, Fault, FaultsConfig, Numbers, Script
from shoal.server.injection import FaultInjector


def names(script: str, num_requests: int, seed: int = 0) -> list[str]:
    """The fault of each request."""
    made = Script(script)
    return [fault.name if (fault := made.fault(number, seed)) else "ok" for number in range(1, num_requests + 1)]


# -- the language ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("ok", "ok ok ok ok ok"),
        ("429", "429 429 429 429 429"),
        ("429*2", "429 429 ok ok ok"),
        ("429*2, ok", "429 429 ok ok ok"),
        ("429 *2,503,ok*1,500", "429 429 503 ok 500"),
        ("cut every=2", "ok cut ok cut ok"),
        ("cut at=3", "ok ok cut ok ok"),
        ("429*2, ok, 500 at=2, error every=4", "429 500 ok error ok"),
        ("ok at=2, 503", "503 ok 503 503 503"),
        ("429 rate=0, 500 rate=1", "500 500 500 500 500"),
    ],
)
def test_which_request_meets_which_fault(script: str, expected: str) -> None:
    assert names(script, 5) == expected.split()


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("429", Fault("429")),
        ("503 retry_after=7", Fault("503", retry_after=7)),
        ("slow", Fault("slow", after=0, seconds=1.0)),
        ("stall after=3 seconds=0.25 *2", Fault("stall", after=3, seconds=0.25)),
        ("cut", Fault("cut", after=None)),
        (" cut   after=0 every=1 ", Fault("cut", after=0)),
        ("kill after=20", Fault("kill", after=20)),
    ],
)
def test_the_parameters_of_a_fault(script: str, fault: Fault) -> None:
    assert Script(script).fault(1, 0) == fault


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", "unknown fault '': there are ok, 429, 500"),
        ("429, , ok", "unknown fault ''"),
        ("teapot*2", "unknown fault 'teapot'"),
        ("429 after=1", r"429 may have retry_after, \*, rate, every, at, each once, and not 'after=1'"),
        ("cut after=1 after=2", "each once, and not 'after=2'"),
        ("429 rate=0.1 *2", "429 may have only one of .*, not rate and "),
        ("429 rate=1.5", "rate must be a number from 0 to 1, not '1.5'"),
        ("429 rate=nan", "rate must be a number"),
        ("429 rate=", "rate must be a number"),
        ("stall seconds=1e3", "seconds must be a number from 0 to 3600"),
        ("error after=1.5", "after must be an integer from 0 to 100000, not '1.5'"),
        ("error after=-1", "after must be an integer"),
        ("error every=0", "every must be an integer from 1"),
        ("429*0", r"\* must be an integer from 1"),
        ("429*", r"\* must be an integer from 1 to .*, not ''"),
        ("429*" + "9" * 5000, r"\* must be an integer .{20,70}$"),
        ("429 at=٣", "at must be an integer"),
    ],
)
def test_what_is_no_script_is_refused_by_name(script: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Script(script)
    if script:
        with pytest.raises(ConfigError, match="fault_script: "):
            FaultsConfig(fault_script=script)


@given(st.text(alphabet="0459ok,*= .ratesyv\t\n\x00é") | st.text())
def test_any_text_is_a_script_or_a_value_error(text: str) -> None:
    try:
        script = Script(text)
    except ValueError:
        return
    for number in (1, 2, 10**9):
        script.fault(number, 0)


# -- decisions ---------------------------------------------------------------------------------------------------------


@st.composite
def scripts(draw: st.DrawFn) -> str:
    rules = []
    for name in draw(st.lists(st.sampled_from(sorted(FAULTS)), min_size=1, max_size=5)):
        keys = draw(st.sets(st.sampled_from(sorted(FAULTS[name])))) if FAULTS[name] else set()
        keys |= draw(st.sets(st.sampled_from(CONDITIONS), max_size=1))
        words = [f"{key}={draw(numbers(key))}".replace("*=", "*") for key in sorted(keys)]
        rules.append(" ".join([name, *words]))
    return ",".join(rules)


def numbers(key: str) -> st.SearchStrategy[Any]:
    least, most = RANGES[key]
    if isinstance(least, int):
        return st.integers(least, min(int(most), least + 5))
    return st.integers(0, int(most) * 8).map(lambda eighths: eighths / 8)


@given(scripts(), st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_faults(script: str, seed: int) -> None:
    assert names(script, 20, seed) == names(script, 20, seed)


def test_a_rate_is_that_of_the_requests_and_another_seed_chooses_others() -> None:
    chosen = [names("429 rate=0.3, cut rate=0.5", 2000, seed) for seed in range(3)]
    for each in chosen:
        assert each.count("429") / 2000 == pytest.approx(0.3, abs=0.05)
        assert each.count("cut") / 2000 == pytest.approx(0.7 * 0.5, abs=0.05), "rules draw independently"
    assert all(one != other for one, other in pairwise(chosen))


@given(st.lists(st.sampled_from("abc"), max_size=40), scripts(), st.integers(0, 9))
def test_what_a_series_meets_does_not_depend_on_the_others(order: list[str], script: str, seed: int) -> None:
    made, counted = Script(script), Numbers()
    met: dict[str, list[Fault | None]] = {}
    for series in order:
        met.setdefault(series, []).append(made.fault(counted.next(series), seed))
    for series, faults in met.items():
        assert faults == [made.fault(number, seed) for number in range(1, len(faults) + 1)], series


def test_the_series_that_are_kept_are_bounded() -> None:
    counted = Numbers()
    for series in range(MAX_SERIES):
        assert counted.next(series) == 1
    assert counted.next(0) == 2, "and so 1 is the one that was idle for longest"
    counted.next("one more")
    assert (counted.next(0), counted.next(2), counted.next(1)) == (3, 2, 1)


# -- messages ----------------------------------------------------------------------------------------------------------

EVENTS = [b'data: {"n": %d}\n\n' % number for number in range(5)]
DONE = b"data: [DONE]\n\n"


def answer(script: str, parts: Sequence[bytes], *, kind: str = "text/event-stream", status: int = 200) -> Any:
    """What is sent of an answer that meets a script: status, headers, body, and whether the connection was cut."""
    sent: list[Message] = []
    was_cut = False

    def cut() -> None:
        nonlocal was_cut
        was_cut = True

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nobody reads the body")

    path: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "state": {"cut": cut}}
    asyncio.run(FaultInjector(app, FaultsConfig(fault_script=script), ())(path, receive, send))
    if not sent:
        return None, {}, b"", was_cut
    start, *bodies = sent
    assert was_cut or not bodies[-1].get("more_body"), "the answer is complete"
    assert all(body["more_body"] for body in bodies[:-1])
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(body["body"] for body in bodies), was_cut


@given(after=st.integers(0, 7), sizes=st.lists(st.integers(1, 3)))
def test_events_are_counted_however_they_come(after: int, sizes: list[int]) -> None:
    events = [*EVENTS, DONE]
    parts, rest = [], events
    for size in sizes:
        parts.append(b"".join(rest[:size]))
        rest = rest[size:]
    parts += rest
    before = b"".join(events[:after])
    for name in ("stall", "slow", "malformed", "cut", "error", "kill"):
        parameters = {"stall": f"after={after} seconds=0", "slow": "seconds=0"}.get(name, f"after={after}")
        status, headers, body, was_cut = answer(f"{name} {parameters}", parts)
        assert (status, headers["x-shoal-fault"]) == (200, name)
        assert was_cut == (name == "cut" and after < len(events))
        if after >= len(events) or name in ("stall", "slow", "kill"):
            assert body == b"".join(events)
        elif name == "cut":
            assert body == before
        elif name == "error":
            assert body.startswith(before) and body.endswith(DONE)
            error = json.loads(body.removeprefix(before).removesuffix(DONE).removeprefix(b"data: "))["error"]
            assert (error["type"], error["code"]) == ("server_error", "internal_error")
        else:
            assert body == before + events[after].replace(b'"', b"'") + b"".join(events[after + 1 :])


def test_a_whole_answer_has_a_middle() -> None:
    whole = json.dumps({"text": "a" * 50, "usage": {"tokens": 5}}).encode()
    assert answer("stall seconds=0", [whole], kind="application/json")[2] == whole
    assert answer("cut after=0", [whole], kind="application/json")[2:] == (b"", True)
    _, headers, body, was_cut = answer("cut after=9", [whole], kind="application/json")
    assert (headers["x-shoal-fault"], body, was_cut) == ("cut", whole[: len(whole) // 2], True)
    malformed = answer("malformed", [whole], kind="application/json")[2]
    assert len(malformed) == len(whole)
    with pytest.raises(json.JSONDecodeError):
        json.loads(malformed)
    status, headers, body, _ = answer("engine_error after=3", [whole], kind="application/json")
    assert (status, headers["x-shoal-fault"]) == (500, "engine_error")
    assert json.loads(body)["error"]["code"] == "engine_error"


def test_an_answer_that_is_an_error_by_itself_stays_as_it_is() -> None:
    for script in ("cut after=0", "error after=0", "malformed after=0"):
        status, headers, body, was_cut = answer(script, [b'{"error": {}}'], kind="application/json", status=400)
        assert (status, body, was_cut) == (400, b'{"error": {}}', False)
        assert "x-shoal-fault" not in headers


@pytest.mark.parametrize(
    ("name", "code"), [("429", "queue_full"), ("500", "internal_error"), ("503", "engine_unavailable")]
)
def test_refusals_look_like_those_of_the_server(name: str, code: str) -> None:
    status, headers, body, _ = answer(name, EVENTS)
    assert (status, json.loads(body)["error"]["code"]) == (int(name), code)
    assert headers.get("retry-after") == (None if name == "500" else "1")
    if name != "500":
        assert answer(f"{name} retry_after=0", EVENTS)[1]["retry-after"] == "0"


def test_a_connection_is_cut_before_the_head() -> None:
    assert answer("cut", EVENTS) == (None, {}, b"", True)
