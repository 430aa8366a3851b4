"""The step trace: its events, and its file, which the server begins and each of its engines continues."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.model.step.executor import ModelExecutor
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.output import SchedulerOutput, StepResult
from shoal.scheduler.step_record import StepRecord
from shoal.server.engine.chrome_trace import ChromeTrace, begin_trace
from tests.fake_backend import FakeBackend
from tests.fakes import Harness


def events(path: Path) -> list[dict[str, Any]]:
    """All events of a trace whose array was not closed."""
    read: list[dict[str, Any]] = json.loads(path.read_text() + "]")
    return read


def records(found: list[dict[str, Any]]) -> list[StepRecord]:
    return [msgspec.convert(event["args"], StepRecord) for event in found if event["name"] == "step"]


def span(name: str, tid: int, ts: float, dur: float, args: Any = None) -> dict[str, Any]:
    event = {"name": name, "ph": "X", "ts": ts * 1e6, "dur": dur * 1e6, "pid": os.getpid(), "tid": tid}
    return event | ({"args": args} if args else {})


def name(kind: str, tid: int, value: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": os.getpid(), "tid": tid, "args": {"name": value}}


def counters(ts: float, running: int, waiting: int, usage: float) -> list[dict[str, Any]]:
    event = {"ph": "C", "ts": ts * 1e6, "pid": os.getpid()}
    return [
        event | {"name": "running", "args": {"requests": running}},
        event | {"name": "waiting", "args": {"requests": waiting}},
        event | {"name": "KV usage", "args": {"share": usage}},
    ]


def test_the_events_of_two_requests(tmp_path: Path) -> None:
    """`b` waits for the only row; a step takes three ticks, and `execute` the second of them."""
    harness = Harness(max_num_seqs=1, num_blocks=8)
    harness.now = -1.0
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=2)
    harness.add("b", [6], max_tokens=1)
    ticks, seen = itertools.count(), list[StepRecord]()
    harness.engine.clock = lambda: float(next(ticks))
    harness.engine.observers = [seen.append, ChromeTrace(tmp_path / "trace.json")]
    for _ in range(3):
        harness.step()

    def step(number: int) -> list[dict[str, Any]]:
        start = 4.0 * number
        return [
            span("step", 1, start, 3, msgspec.to_builtins(seen[number])),
            span("schedule", 1, start, 1),
            span("execute", 1, start + 1, 1),
            span("update", 1, start + 2, 1),
        ]

    assert events(tmp_path / "trace.json") == [
        name("process_name", 1, "engine"),
        name("thread_name", 1, "steps"),
        name("thread_name", 2, "row 0"),
        *step(0),
        *counters(0, 1, 1, 0.25),
        *step(1),
        *counters(4, 1, 1, 0.25),
        span("a", 2, 0, 7, {"arrived": -1e6, "preempted": False}),
        *step(2),
        *counters(8, 1, 0, 0.125),
        span("b", 2, 8, 3, {"arrived": -1e6, "preempted": False}),
        *counters(11, 0, 0, 0.0),
    ]


class Watched:
    """A `ModelExecutor` that records for each step in which row of its table the tokens of each request stand."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        config = harness.config
        backend = FakeBackend(config.num_blocks, config.block_size)
        limits = {"max_num_seqs": config.max_num_seqs, "max_model_len": config.max_model_len}
        self.model = ModelExecutor(backend, block_size=config.block_size, **limits)
        self.model.rows.token_ids[:] = -1
        self.rows: list[dict[str, int]] = []

    def execute(self, output: SchedulerOutput) -> StepResult:
        self.model.rows.token_ids[output.released] = -1  # so that nothing is found there but what comes now
        result = self.model.execute(output)
        batch = self.harness.scheduler.running | self.harness.scheduler.padding
        table = self.model.rows.token_ids.tolist()
        self.rows.append({})
        for share in output.scheduled:
            tokens = batch[share.request_id].token_ids
            (self.rows[-1][share.request_id],) = [
                n for n, row in enumerate(table) if row[: len(tokens)] == list(tokens)
            ]
        return result


@pytest.mark.parametrize("policy", ["fcfs", "static", "fair", "sjf"])
def test_the_rows_that_it_shows_are_those_in_which_the_executor_computes(tmp_path: Path, policy: str) -> None:
    """Over random schedules, with preemptions, padding rows and aborts; no two prompts begin alike."""
    rng, path = random.Random(policy), tmp_path / "trace.json"
    harness = Harness(policy=policy, num_blocks=16, max_num_seqs=4, max_chunk_tokens=8, enable_prefix_caching=False)
    watched = Watched(harness)
    harness.engine.executor, harness.engine.observers = watched, [ChromeTrace(path)]
    for number in range(60):
        first = [number // 16, number % 16]
        prompt = first + [rng.randrange(16) for _ in range(rng.randint(0, 20))]
        harness.add(f"r{number}", prompt, max_tokens=rng.randint(1, 16), client=rng.choice("ab"))
        for _ in range(rng.randint(0, 4)):
            harness.step()
        if rng.random() < 0.2 and harness.scheduler.running:
            harness.abort(rng.choice(list(harness.scheduler.running)))
    harness.drain()
    found = events(path)
    steps = records(found)
    assert [{share.request_id: share.row for share in step.shares} for step in steps] == watched.rows
    assert policy == "static" or sum(step.num_preemptions for step in steps) > 0
    stays = [event for event in found if event["ph"] == "X" and event["tid"] > 1]
    assert {(event["name"], event["tid"] - 2) for event in stays} == {
        (request_id, row) for rows in watched.rows for request_id, row in rows.items()
    }
    assert len(stays) == sum(len(step.joined) for step in steps)
    for tid in {event["tid"] for event in stays}:
        row = sorted((event["ts"], event["ts"] + event["dur"]) for event in stays if event["tid"] == tid)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(row)), "two requests in a row"


def test_a_padding_row_is_shown_until_its_batch_ends_and_an_aborted_request_until_its_last_step(tmp_path: Path) -> None:
    harness = Harness(policy="static", max_num_seqs=2)
    ticks = itertools.count()
    harness.engine.clock = lambda: float(next(ticks))
    harness.engine.observers = [ChromeTrace(tmp_path / "trace.json")]
    for request_id, max_tokens in (("a", 1), ("b", 9)):
        harness.add(request_id, [1], max_tokens=max_tokens)
    for _ in range(3):
        harness.step()
    harness.abort("b")
    harness.step()
    stays = [event for event in events(tmp_path / "trace.json") if event["name"] in ("a", "b")]
    # Three steps of three seconds, and a second between each two.
    assert [(event["ts"], event["dur"]) for event in stays] == [(0.0, 11e6)] * 2


@pytest.mark.parametrize("origin", [0.0, 1e6 / 3])
def test_what_lies_inside_a_step_does_so_to_the_last_digit(tmp_path: Path, origin: float) -> None:
    """Perfetto drops a slice that ends after the one around it."""
    harness = Harness()
    ticks = itertools.count(1)
    harness.engine.clock = lambda: origin + next(ticks) * 1e-6 / 7
    harness.engine.observers = [ChromeTrace(tmp_path / "trace.json")]
    harness.add("a", [1], max_tokens=50)
    harness.drain()
    spans = [event for event in events(tmp_path / "trace.json") if event["ph"] == "X" and event["tid"] == 1]
    times = [(round(event["ts"] * 1000), round(event["dur"] * 1000)) for event in spans]
    for step, schedule, execute, update in zip(*[iter(times)] * 4, strict=True):
        assert schedule[0] == step[0]
        assert sum(schedule) == execute[0]
        assert sum(execute) == update[0]
        assert sum(update) == sum(step)


# -- the file ----------------------------------------------------------------------------------------------------------


def run_engine(path: Path, request_id: str) -> ChromeTrace:
    harness, trace = Harness(), ChromeTrace(path)
    harness.engine.observers = [trace]
    harness.add(request_id, [1, 2, 3], max_tokens=2)
    harness.drain()
    return trace


def test_each_engine_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("of an earlier server")
    begin_trace(path)
    for number, request_id in enumerate("ab", 1):
        trace = run_engine(path, request_id)
        assert len(records(events(path))) == 3 * number, "nothing is kept back"
    steps = [step.shares[0].request_id for step in records(events(path)) if step.shares]
    assert steps == ["a", "a", "b", "b"]
    assert path.read_text().count("[\n") == 1
    trace.close()
    assert len(json.loads(path.read_text())) == path.read_text().count("\n") - 2, "each event has a line of its own"


def test_a_trace_that_was_closed_is_json_and_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = run_engine(path, "a")
    found = events(path)
    trace.close()
    assert json.loads(path.read_text()) == found
    for record in records(found):
        trace(record)
    trace.close()
    assert json.loads(path.read_text()) == found


@pytest.mark.parametrize("start", [begin_trace, ChromeTrace])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, start: object) -> None:
    assert callable(start)
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none" / "a.json", "No such file or directory")):
        with pytest.raises(ConfigError) as caught:
            start(path)
        assert caught.value.message == f"trace: cannot write {path}: {reason}"
        assert caught.value.param == "trace"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_ends_the_trace_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    run_engine(Path("/dev/full"), "a").close()
    assert [record.message for record in caplog.records] == [
        "the trace /dev/full ends here: No space left on device",
    ]


def test_where_the_disk_is_full_the_trace_ends_with_a_whole_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace.json"
    run_engine(path, "a")
    before = events(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000, limits[1]))  # the system writes a part
    try:
        run_engine(path, "b").close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = events(path)
    assert found[: len(before)] == before
    assert len(found) > len(before), "what fits is there"
    assert [record.message for record in caplog.records] == [f"the trace {path} ends here: File too large"]
