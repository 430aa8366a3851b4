"""The record of each step that the observers of an engine get."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.loadtest.costs import StepShape
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.step_record import AskedRecord, ShareRecord, StepRecord
from tests.examples import examples
from tests.fakes import ALL, Choose, Harness, InjectedError, hashed


def observed(harness: Harness) -> list[StepRecord]:
    """The records of the steps to come, on a clock that ticks a second whenever it is read."""
    records: list[StepRecord] = []
    ticks = itertools.count()
    harness.engine.clock = lambda: float(next(ticks))
    harness.engine.observers = [records.append]
    return records


def test_the_records_of_two_requests() -> None:
    """`b` waits for the only row; each part of a step takes a tick."""
    harness = Harness(max_num_seqs=1, num_blocks=8)
    harness.now = -1.0
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=2)
    harness.add("b", [6], max_tokens=1)
    records = observed(harness)
    for _ in range(3):
        harness.step()

    def record(number: int, share: ShareRecord, **others: Any) -> StepRecord:
        unchanged = {"preempted": [], "num_running": 1, "num_preemptions": 0, "num_blocks": 8}
        seconds = {"schedule_seconds": 1.0, "execute_seconds": 1.0, "update_seconds": 1.0}
        return StepRecord(number=number, start=4.0 * number, shares=[share], **seconds, **unchanged, **others)

    assert records == [
        record(
            0,
            ShareRecord("a", 0, 0, 5, 0, samples=True, is_padding=False),
            joined={"a": 1.0},
            asked={"a": AskedRecord(5, 2)},
            left=[],
            num_waiting=1,
            num_used_blocks=2,
            num_kv_tokens=5,
        ),
        record(
            1,
            ShareRecord("a", 0, 5, 1, 0, samples=True, is_padding=False),
            joined={},
            left=["a"],
            num_waiting=1,
            num_used_blocks=2,
            num_kv_tokens=6,
        ),
        record(
            2,
            ShareRecord("b", 0, 0, 1, 0, samples=True, is_padding=False),
            joined={"b": 9.0},
            asked={"b": AskedRecord(1, 1)},
            left=["b"],
            num_waiting=0,
            num_used_blocks=1,
            num_kv_tokens=1,
        ),
    ]
    assert [one.seconds for one in records] == [3.0, 3.0, 3.0]


def test_all_observers_are_told_and_a_record_crosses_the_wire_as_it_is() -> None:
    harness = Harness()
    records, others = observed(harness), list[bytes]()
    harness.engine.observers = [records.append, lambda record: others.append(msgspec.json.encode(record))]
    harness.add("a", [1], max_tokens=3)
    harness.drain()
    assert len(records) == 4
    assert [msgspec.json.decode(text, type=StepRecord) for text in others] == records


def rows(records: list[StepRecord]) -> list[dict[str, int]]:
    """The row of each request, step by step."""
    return [{share.request_id: share.row for share in record.shares} for record in records]


def test_a_request_that_joins_takes_the_lowest_free_row_and_keeps_it() -> None:
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
    padding = [[share.is_padding for share in record.shares] for record in records[:3]]
    assert padding == [[False, False], [True, False], [True, False]]
    assert [record.left for record in records[:4]] == [[], [], ["b", "a"], ["c", "d"]]
    assert [record.num_running for record in records[:4]] == [2, 1, 1, 2]


def test_a_preempted_request_leaves_its_row_and_has_not_left_for_good() -> None:
    harness = Harness(num_blocks=4, max_num_seqs=2)
    records = observed(harness)
    harness.add("a", [1, 2, 3, 4, 5, 6], max_tokens=6)
    harness.add("b", [7, 8, 9, 10, 11, 12, 13], max_tokens=6)
    harness.drain()
    assert [record.preempted for record in records if record.preempted] == [["b"]]
    assert [record.gave_way_to for record in records if record.gave_way_to] == [{"b": "b"}], "nobody took its place"
    assert sum(record.num_preemptions for record in records) == 1
    assert [request_id for record in records for request_id in record.left] == ["a", "b"]
    assert [list(record.joined) for record in records if record.joined] == [["a", "b"], ["b"]]


def test_an_aborted_request_has_left_with_the_next_step() -> None:
    harness = Harness()
    records = observed(harness)
    harness.add("a", [1], max_tokens=9)
    harness.step()
    harness.take(harness.scheduler.abort("a"))
    harness.step()
    assert [record.left for record in records] == [[], ["a"]]
    assert [len(record.shares) for record in records] == [1, 0]


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
    assert record.left == ["a"]
    assert (record.schedule_seconds, record.execute_seconds, record.update_seconds) == (1.0, 2.0, 1.0)
    assert rows(records) == [{"a": 0, "b": 1}]


def test_without_an_observer_the_clock_is_read_as_often_as_the_scheduler_needs_it() -> None:
    harness = Harness()
    observed(harness)
    harness.engine.observers = []
    harness.add("a", [1], max_tokens=1)
    harness.step()
    assert harness.engine.clock() == 2.0


# -- whatever happens ------------------------------------------------------------------------------------------------

prompts = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=20)
workloads = st.lists(st.tuples(prompts, st.integers(1, 14), st.integers(0, 10)), min_size=1, max_size=8)


def draft(choose: Choose, request_id: str, context: list[int]) -> list[int]:
    """Draft two right tokens and a wrong one."""
    first = choose(request_id, context)
    second = choose(request_id, [*context, first])
    return [first, second, 49 - choose(request_id, [*context, first, second])]


@settings(max_examples=examples(150), deadline=None)
@given(
    workload=workloads,
    policy=st.sampled_from(sorted(POLICIES)),
    num_blocks=st.integers(9, 20),
    num_groups=st.integers(1, 2),
    speculates=st.booleans(),
    lookahead=st.integers(0, 3),
)
def test_what_it_says_of_memory_and_work_is_what_was_done(
    *,
    workload: list[tuple[list[int], int, int]],
    policy: str,
    num_blocks: int,
    num_groups: int,
    speculates: bool,
    lookahead: int,
) -> None:
    """Compared with slots, pairs and keys that are counted one by one."""
    choose = hashed(50)
    harness = Harness(
        choose,
        (lambda request_id, context: draft(choose, request_id, context)) if speculates else None,
        policy=policy,
        knobs=POLICIES[policy].Knobs.select({"fair_lead": 2}),
        groups=ALL * num_groups,
        num_blocks=num_blocks * num_groups,
        max_num_seqs=4,
        max_chunk_tokens=7,
        num_lookahead_tokens=lookahead,
    )
    arriving = [(at, f"r{index}", prompt, max_tokens) for index, (prompt, max_tokens, at) in enumerate(workload)]
    records: list[StepRecord] = []
    harness.engine.observers = [records.append]
    for now in itertools.count():
        for _, request_id, prompt, max_tokens in (one for one in arriving if one[0] == now):
            harness.add(request_id, prompt, max_tokens=max_tokens, client=request_id[-1])
        num_seen, num_preemptions = len(records), harness.scheduler.stats().num_preemptions
        harness.step()
        for record in records[num_seen:]:
            check(record, harness)
            assert record.num_preemptions == harness.scheduler.stats().num_preemptions - num_preemptions
        if now > 10 and not harness.scheduler.num_unfinished:
            break
    harness.step()
    assert [record.number for record in records] == list(range(len(records)))
    check_stays(records, harness)


def check(record: StepRecord, harness: Harness) -> None:
    """Count what the executor was asked for and what others keep, block by block and position by position."""
    size, num_groups = harness.config.block_size, len(harness.config.cache_groups)
    shares = harness.executor.steps[-1]

    def filled(block_ids: Sequence[int], count: int) -> set[int]:
        places = itertools.product(range(count), range(num_groups))
        return {block_ids[at // size * num_groups + group] * size + at % size for at, group in places}

    slots = set[int]().union(*(filled(share.blocks, share.start + share.num_tokens) for share in shares))
    blocks = {block for share in shares for block in share.blocks}
    served = {share.request_id for share in shares}
    for request in harness.scheduler.running.values():
        if request.request_id not in served:
            slots |= filled(request.block_ids, request.num_computed_tokens)
            blocks.update(request.block_ids)
    assert record.num_kv_tokens == len(slots)
    assert record.num_used_blocks == len(blocks)
    pairs = [position + 1 for share in shares for position in range(share.start, share.start + share.num_tokens)]
    shape = StepShape.of(record.shares)
    assert shape.num_pairs == sum(pairs)
    assert shape.num_keys == sum(share.start + share.num_tokens for share in shares)


def check_stays(records: list[StepRecord], harness: Harness) -> None:
    """Rows have one request at a time, the lowest is taken first, and every request leaves for good once."""
    occupied: dict[str, int] = {}
    for record in records:
        served = {share.request_id for share in record.shares}
        preempted = {occupied.pop(request_id) for request_id in record.preempted if request_id not in served}
        for request_id in record.left:
            if request_id not in served:
                del occupied[request_id]
        for share in record.shares:
            if share.request_id in record.joined:
                assert share.request_id not in occupied
                assert share.row < harness.config.max_num_seqs
                free = set(range(share.row)) - set(occupied.values())
                # A request that joined before another was preempted in the same step could not have its row.  One that
                # joined in this step and was preempted in it had a row as well, of which the record does not tell.
                num_untold = record.num_preemptions - len(record.preempted)
                assert len(free - preempted) <= num_untold, "a lower row was free"
                occupied[share.request_id] = share.row
            assert occupied[share.request_id] == share.row
        assert len(set(occupied.values())) == len(occupied)
        for request_id in record.left:
            occupied.pop(request_id, None)
    assert not occupied
    assert sorted(name for record in records for name in record.left) == sorted(harness.finish_reasons)
