"""What an observer is told of each step, and the Chrome trace that is made of it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.policies import POLICIES, select_knobs
from shoal.scheduler.trace import ChromeTrace, StepRecord
from tests.fakes import Choose, Harness, InjectedError, hashed


def observed(harness: Harness) -> list[StepRecord]:
    """The records of the steps to come, on a clock that ticks a second whenever it is read."""
    records: list[StepRecord] = []
    ticks = itertools.count()
    harness.engine.clock = lambda: float(next(ticks))
    harness.engine.observe = records.append
    return records


def events(records: list[StepRecord], **options: Any) -> list[dict[str, Any]]:
    """What a trace of these steps says, read as JSON."""
    written: list[str] = []
    trace = ChromeTrace(written.append, **options)
    for record in records:
        trace.step(record)
    assert len(written) == 1 + len(records), "one piece of text for each step"
    assert all(text.endswith("\n") for text in written)
    read: list[dict[str, Any]] = json.loads("".join(written).rstrip(",\n") + "]")
    return read


def span(name: str, tid: int, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    event = {"name": name, "ph": "X", "ts": ts * 1e6, "dur": dur * 1e6, "pid": 7, "tid": tid}
    return event | ({"args": args} if args else {})


def name(kind: str, tid: int, value: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 7, "tid": tid, "args": {"name": value}}


def counters(ts: float, running: int, waiting: int, usage: float) -> list[dict[str, Any]]:
    event = {"ph": "C", "ts": ts * 1e6, "pid": 7}
    return [
        event | {"name": "running", "args": {"requests": running}},
        event | {"name": "waiting", "args": {"requests": waiting}},
        event | {"name": "KV usage", "args": {"share": usage}},
    ]


def test_the_events_of_two_requests() -> None:
    """`b` waits for the only row; a step takes three ticks, and `execute` the second of them."""
    harness = Harness(max_num_seqs=1, num_blocks=8)
    harness.now = -1.0
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=2)
    harness.add("b", [6], max_tokens=1)
    records = observed(harness)
    for _ in range(3):
        harness.step()

    def step(start: float, **args: Any) -> list[dict[str, Any]]:
        unchanged = {"execute": 1e6, "blocks": 8, "preemptions": 0}
        return [
            span("step", 1, start, 3, **(unchanged | args)),
            span("schedule", 1, start, 1),
            span("execute", 1, start + 1, 1),
            span("update", 1, start + 2, 1),
        ]

    found = events(records, pid=7)
    assert found == [
        name("process_name", 1, "engine"),
        name("thread_name", 1, "steps"),
        name("thread_name", 2, "row 0"),
        *step(
            0,
            rows=[["a", 0, 5, 0, True, False]],
            arrived={"a": -1e6},
            left=[],
            pairs=15,
            keys=5,
            waiting=1,
            used_blocks=2,
            kv_tokens=5,
        ),
        *counters(0, 1, 1, 0.25),
        *step(
            4,
            rows=[["a", 0, 1, 0, True, False]],
            arrived={},
            left=["a"],
            pairs=6,
            keys=6,
            waiting=1,
            used_blocks=2,
            kv_tokens=6,
        ),
        *counters(4, 1, 1, 0.25),
        span("a", 2, 0, 7, arrived=-1e6, preempted=False),
        *step(
            8,
            rows=[["b", 0, 1, 0, True, False]],
            arrived={"b": -1e6},
            left=["b"],
            pairs=1,
            keys=1,
            waiting=0,
            used_blocks=1,
            kv_tokens=1,
        ),
        *counters(8, 1, 0, 0.125),
        span("b", 2, 8, 3, arrived=-1e6, preempted=False),
        *counters(11, 0, 0, 0.0),
    ]


def test_a_trace_that_goes_on_has_no_second_opening() -> None:
    written: list[str] = []
    ChromeTrace(written.append, pid=7, continues=True)
    assert [json.loads(line.rstrip(",")) for line in written[0].splitlines()] == [
        name("process_name", 1, "engine"),
        name("thread_name", 1, "steps"),
    ]


def rows(records: list[StepRecord]) -> list[dict[str, int]]:
    """The row of each request, step by step."""
    steps = [event for event in events(records) if event["name"] == "step"]
    return [{share[0]: share[1] for share in step["args"]["rows"]} for step in steps]


def test_who_joins_takes_the_lowest_free_row_and_keeps_it() -> None:
    harness = Harness(max_num_seqs=3)
    records = observed(harness)
    for request_id, max_tokens in (("a", 1), ("b", 3), ("c", 2), ("d", 3), ("e", 1)):
        harness.add(request_id, [1], max_tokens=max_tokens)
    harness.drain()
    assert rows(records) == [{"a": 0, "b": 1, "c": 2}, {"b": 1, "c": 2, "d": 0}, {"b": 1, "d": 0, "e": 2}, {"d": 0}, {}]


def test_a_padding_row_is_kept_until_the_batch_ends() -> None:
    harness = Harness(policy="static", max_num_seqs=2)
    records = observed(harness)
    for request_id, max_tokens in (("a", 1), ("b", 3), ("c", 1), ("d", 1)):
        harness.add(request_id, [1], max_tokens=max_tokens)
    harness.drain()
    assert rows(records)[:4] == [{"a": 0, "b": 1}, {"a": 0, "b": 1}, {"a": 0, "b": 1}, {"c": 0, "d": 1}]
    steps = [event["args"] for event in events(records) if event["name"] == "step"]
    assert [[share[-1] for share in step["rows"]] for step in steps[:3]] == [
        [False, False],
        [True, False],
        [True, False],
    ]
    assert [step["left"] for step in steps[:4]] == [[], [], ["a", "b"], ["c", "d"]]
    (slot,) = [event for event in events(records) if event["name"] == "a"]
    assert slot["dur"] == 11e6, "three steps of three seconds, and a second between each two"


def test_a_preempted_request_leaves_its_row_and_has_not_left_for_good() -> None:
    harness = Harness(num_blocks=4, max_num_seqs=2)
    records = observed(harness)
    harness.add("a", [1, 2, 3, 4, 5, 6], max_tokens=6)
    harness.add("b", [7, 8, 9, 10, 11, 12, 13], max_tokens=6)
    harness.drain()
    found = events(records)
    slots = [event for event in found if event["name"] == "b"]
    assert [slot["args"]["preempted"] for slot in slots] == [True, False]
    steps = [event["args"] for event in found if event["name"] == "step"]
    assert sum(step["preemptions"] for step in steps) == 1
    assert [request_id for step in steps for request_id in step["left"]] == ["a", "b"]
    assert [list(step["arrived"]) for step in steps if step["arrived"]] == [["a", "b"], ["b"]]


def test_an_aborted_request_has_left_with_its_last_step() -> None:
    harness = Harness()
    records = observed(harness)
    harness.add("a", [1], max_tokens=9)
    harness.step()
    harness.take(harness.scheduler.abort("a"))
    harness.step()
    found = events(records)
    assert [event["args"]["left"] for event in found if event["name"] == "step"] == [[], ["a"]]
    (slot,) = [event for event in found if event["name"] == "a"]
    assert (slot["ts"], slot["dur"]) == (0.0, 3e6)


def test_a_step_that_fails_is_one_step() -> None:
    harness = Harness()
    records = observed(harness)
    harness.add("a", [1], max_tokens=1)
    harness.add("b", [2], max_tokens=2)

    def fail(output: Any) -> None:
        if any(share.request_id == "a" for share in output.scheduled):
            raise InjectedError("a")

    harness.executor.fail = fail
    harness.step()
    (record,) = records
    assert (record.left, [output.request_id for output in record.news]) == (["a"], ["a", "b"])
    assert record.scheduled_at < record.executed_at < record.updated_at
    assert rows(records) == [{"a": 0, "b": 1}]


def test_without_an_observer_the_clock_is_read_as_often_as_the_scheduler_needs_it() -> None:
    harness = Harness()
    observed(harness)
    harness.engine.observe = None
    harness.add("a", [1], max_tokens=1)
    harness.step()
    assert harness.engine.clock() == 2.0


# -- whatever happens ------------------------------------------------------------------------------------------------

prompts = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=20)
workloads = st.lists(st.tuples(prompts, st.integers(1, 14), st.integers(0, 10)), min_size=1, max_size=8)


def guess(choose: Choose, request_id: str, context: list[int]) -> list[int]:
    """Right, right, wrong: two drafted tokens may be accepted."""
    first = choose(request_id, context)
    second = choose(request_id, [*context, first])
    return [first, second, 49 - choose(request_id, [*context, first, second])]


@settings(max_examples=150, deadline=None)
@given(
    workload=workloads,
    policy=st.sampled_from(sorted(POLICIES)),
    num_blocks=st.integers(9, 20),
    speculates=st.booleans(),
    lookahead=st.integers(0, 3),
)
def test_what_it_says_of_memory_and_work_is_what_was_done(
    workload: list[tuple[list[int], int, int]], policy: str, num_blocks: int, speculates: bool, lookahead: int
) -> None:
    """Against slots, pairs and keys that are counted one by one."""
    choose = hashed(50)
    harness = Harness(
        choose,
        (lambda request_id, context: guess(choose, request_id, context)) if speculates else None,
        policy=policy,
        knobs=select_knobs(policy, {"fair_lead": 2}),
        num_blocks=num_blocks,
        max_num_seqs=4,
        max_chunk_tokens=7,
        num_lookahead_tokens=lookahead,
    )
    arriving = [(at, f"r{index}", prompt, max_tokens) for index, (prompt, max_tokens, at) in enumerate(workload)]
    num_seen = 0
    records: list[StepRecord] = []
    harness.engine.observe = records.append
    for now in itertools.count():
        for _, request_id, prompt, max_tokens in (one for one in arriving if one[0] == now):
            harness.add(request_id, prompt, max_tokens=max_tokens, client=request_id[-1])
        num_preemptions = harness.scheduler.stats().num_preemptions
        harness.step()
        for record in records[num_seen:]:
            check(record, harness)
            assert len(record.preempted) == harness.scheduler.stats().num_preemptions - num_preemptions
        num_seen = len(records)
        if now > 10 and not harness.scheduler.num_unfinished:
            break
    harness.step()
    check_spans(events(records), harness)


def check(record: StepRecord, harness: Harness) -> None:
    """Count what the executor was asked for and what others keep, block by block and position by position."""
    size = harness.config.block_size
    shares = harness.executor.steps[-1]
    slots = {
        share.blocks[position // size] * size + position % size
        for share in shares
        for position in range(share.start + share.num_tokens)
    }
    blocks = {block for share in shares for block in share.blocks}
    served = {share.request_id for share in shares}
    for request in harness.scheduler.running.values():
        if request.request_id not in served:
            filled = range(request.num_computed_tokens)
            slots |= {request.block_ids[position // size] * size + position % size for position in filled}
            blocks.update(request.block_ids)
    assert record.num_kv_tokens == len(slots)
    assert record.num_used_blocks == len(blocks)
    pairs = [position + 1 for share in shares for position in range(share.start, share.start + share.num_tokens)]
    assert record.num_pairs == sum(pairs)
    assert record.num_keys == sum(share.start + share.num_tokens for share in shares)


def check_spans(found: list[dict[str, Any]], harness: Harness) -> None:
    """Rows have one occupant at a time, the lowest row is taken first, and everybody leaves for good once."""
    spans = [event for event in found if event["ph"] == "X"]
    for tid in {event["tid"] for event in spans} - {1}:
        row = sorted((event["ts"], event["ts"] + event["dur"]) for event in spans if event["tid"] == tid)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(row))
    occupied: dict[str, int] = {}
    for event in spans:  # in the order in which they were written
        if event["tid"] != 1:
            del occupied[event["name"]]  # who leaves, or is preempted
        elif event["name"] == "step":
            step = event["args"]
            now = {share[0]: share[1] for share in step["rows"]}
            assert len(set(now.values())) == len(now)
            stayed = now.keys() & occupied.keys() - step["arrived"].keys()
            assert all(now[request_id] == occupied[request_id] for request_id in stayed)
            occupied |= now  # who sits out keeps a row too
            for request_id in step["arrived"]:
                assert now[request_id] <= len(occupied) - 1, "a lower row was free"
    steps = [event["args"] for event in spans if event["name"] == "step"]
    assert sorted(name for step in steps for name in step["left"]) == sorted(harness.finish_reasons)


@pytest.mark.parametrize("origin", [0.0, 1e6 / 3])
def test_what_lies_inside_a_step_does_so_to_the_last_digit(origin: float) -> None:
    """Perfetto drops a slice that ends after the one around it."""
    harness = Harness()
    records = observed(harness)
    ticks = itertools.count(1)
    harness.engine.clock = lambda: origin + next(ticks) * 1e-6 / 7
    harness.add("a", [1], max_tokens=50)
    harness.drain()
    spans = [event for event in events(records) if event["ph"] == "X" and event["tid"] == 1]
    times = [(round(event["ts"] * 1000), round(event["dur"] * 1000)) for event in spans]
    for step, schedule, execute, update in zip(*[iter(times)] * 4, strict=True):
        assert schedule[0] == step[0]
        assert sum(schedule) == execute[0]
        assert sum(execute) == update[0]
        assert sum(update) == sum(step)
