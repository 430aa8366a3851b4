"""How one request was served, told from the records of steps that were made by hand or by an engine."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.explanation import (
    ANOTHER,
    MAX_CHUNKS,
    MAX_COMPANIONS,
    MAX_KNOWN_COMPANIONS,
    MAX_PREEMPTIONS,
    Companion,
    Explanation,
    Preemption,
    PrefillChunk,
    RequestHistory,
)
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.step_record import ShareRecord, StepRecord
from tests.examples import examples
from tests.fakes import Harness, hashed

STEP_MS = 3000.0  # of the engine below, which idles for a second between two steps


def watched(harness: Harness, *request_ids: str) -> dict[str, RequestHistory]:
    """The histories of requests on a clock that ticks a second whenever it is read: four times in each step."""
    ticks = itertools.count()
    histories = {request_id: RequestHistory(request_id) for request_id in request_ids}
    harness.engine.clock = lambda: float(next(ticks))
    harness.engine.observers = [*histories.values()]
    return histories


def explained(history: RequestHistory) -> Explanation:
    found = history.explanation()
    assert found is not None
    return found


def share(request_id: str, start: int = 0, count: int = 1, *, samples: bool = True) -> ShareRecord:
    return ShareRecord(request_id, 0, start, count, 0, samples=samples, is_padding=False)


def step(start: float, *shares: ShareRecord, seconds: float = 1.0, **others: Any) -> StepRecord:
    counts = dict.fromkeys(("num_running", "num_waiting", "num_preemptions", "num_used_blocks", "num_kv_tokens"), 0)
    values = {"joined": {}, "preempted": [], "num_blocks": 8} | counts | others
    return StepRecord(number=0, start=start, execute_seconds=seconds, shares=list(shares), **values)


def test_a_request_that_waits_and_is_read_in_chunks() -> None:
    """`b` waits for the one row until `a` has ended after two steps; then its prompt takes three."""
    harness = Harness(max_num_seqs=1, max_chunk_tokens=4)
    histories = watched(harness, "a", "b")
    harness.now = -1.0
    harness.add("a", [1, 2, 3], max_tokens=2)
    harness.add("b", list(range(10)), max_tokens=3)
    assert histories["b"].explanation() is None
    harness.drain()
    assert explained(histories["b"]) == Explanation(
        request_id="b",
        total_ms=9000 + 4 * 4000 + STEP_MS,
        queued_ms=9000,
        prefill_ms=3 * STEP_MS,
        decode_ms=2 * STEP_MS,
        preempted_ms=0,
        other_ms=4000,
        num_cached_tokens=0,
        num_output_tokens=3,
        num_prefill_chunks=3,
        prefill_chunks=[PrefillChunk(4, STEP_MS), PrefillChunk(4, STEP_MS), PrefillChunk(2, STEP_MS)],
        num_decode_steps=2,
        median_decode_ms=STEP_MS,
        longest_decode_ms=STEP_MS,
        mean_batch=1.0,
        max_batch=1,
        num_companions=0,
        companions=[],
        num_preemptions=0,
        preemptions=[],
        num_drafted_tokens=0,
        num_accepted_tokens=0,
    )


def test_a_request_that_is_preempted_says_for_which_and_for_how_long() -> None:
    harness = Harness(num_blocks=4, policy="priority")
    histories = watched(harness, "a", "b")
    harness.add("b", [7, 8, 9, 10, 11, 12, 13], max_tokens=6, priority=9)
    harness.step()
    harness.add("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=6)
    harness.drain()
    victim = explained(histories["b"])
    (preemption,) = victim.preemptions
    assert preemption.by == "a"
    assert preemption.ms == victim.preempted_ms
    assert victim.preempted_ms % 4000 == 0
    assert victim.preempted_ms > 0
    assert victim.num_prefill_chunks == 2, "it is computed again"
    assert victim.num_output_tokens == 6
    assert explained(histories["a"]).num_preemptions == 0


def test_a_request_that_lacks_blocks_gives_way_to_nobody() -> None:
    harness = Harness(num_blocks=4, max_num_seqs=2)
    histories = watched(harness, "a", "b")
    harness.add("a", [1, 2, 3, 4, 5, 6], max_tokens=6)
    harness.add("b", [7, 8, 9, 10, 11, 12, 13], max_tokens=6)
    harness.drain()
    assert [one.by for one in explained(histories["b"]).preemptions] == [None]


def test_a_prefix_that_is_found_is_told() -> None:
    harness = Harness()
    histories = watched(harness, "a", "b")
    harness.add("a", list(range(12)), max_tokens=2)
    harness.drain()
    harness.add("b", [*range(8), 40, 41], max_tokens=2)
    harness.drain()
    assert explained(histories["b"]).num_cached_tokens == 8
    assert explained(histories["b"]).prefill_chunks == [PrefillChunk(2, STEP_MS)]


def test_drafted_tokens_are_counted() -> None:
    """Of three drafted tokens the first two are right; the last proposal is cut to what room is left."""
    choose = hashed(50)

    def draft(request_id: str, context: list[int]) -> list[int]:
        right: list[int] = []
        for _ in range(2):
            right.append(choose(request_id, context + right))
        return [*right, -5]

    harness = Harness(choose, draft)
    histories = watched(harness, "a")
    harness.add("a", [1, 2, 3], max_tokens=10)
    harness.drain()
    found = explained(histories["a"])
    assert found.num_output_tokens == 10
    assert found.num_decode_steps == 3
    assert (found.num_drafted_tokens, found.num_accepted_tokens) == (8, 6)


def test_a_padding_row_is_company_but_no_part_of_an_answer() -> None:
    harness = Harness(policy="static", max_num_seqs=2)
    histories = watched(harness, "a", "b")
    harness.add("a", [1], max_tokens=1)
    harness.add("b", [1], max_tokens=3)
    harness.drain()
    assert explained(histories["a"]).num_output_tokens == 1
    assert explained(histories["a"]).num_decode_steps == 0
    assert explained(histories["a"]).median_decode_ms is None
    assert explained(histories["b"]).companions == [Companion("a", 3)]
    assert (explained(histories["b"]).mean_batch, explained(histories["b"]).max_batch) == (2.0, 2)


def test_what_is_listed_is_bounded_and_what_is_counted_is_not() -> None:
    history = RequestHistory("a")
    many = [share(f"r{number}") for number in range(MAX_KNOWN_COMPANIONS + 9)]
    history(step(0.0, share("a", samples=False), *many, joined={"a": 0.0}))
    now = 0.0
    for number in range(MAX_CHUNKS + 3):
        now = 10.0 * number
        history(step(now + 1, share("a", samples=False), joined={"a": now + 1}))
        history(step(now + 2, share("b"), gave_way_to={"a": "b"}))
    found = explained(history)
    assert (found.num_prefill_chunks, len(found.prefill_chunks)) == (MAX_CHUNKS + 4, MAX_CHUNKS)
    assert (found.num_preemptions, len(found.preemptions)) == (MAX_CHUNKS + 3, MAX_PREEMPTIONS)
    assert (found.num_companions, len(found.companions)) == (MAX_KNOWN_COMPANIONS, MAX_COMPANIONS)
    assert found.max_batch == MAX_KNOWN_COMPANIONS + 10


def test_a_preemption_that_has_not_ended_is_told() -> None:
    history = RequestHistory("a")
    history(step(0.0, share("a"), joined={"a": 0.5}))
    history(step(1.0, share("b"), gave_way_to={"a": "b"}))
    history(step(2.0, share("b"), gave_way_to={"a": "c"}))  # it had joined, and given way at once
    assert explained(history).preemptions == [Preemption("b", None)]


def test_requests_of_others_are_counted_and_not_named() -> None:
    history = RequestHistory("a")
    history(step(0.0, share("a"), share("mine"), share("other"), joined={"a": 0.0}), {"a", "mine"})
    history(step(1.0, share("a", 1), share("other")), {"a"})
    history(step(2.0, share("other"), gave_way_to={"a": "other"}), {"a"})
    history(step(3.0, share("a"), joined={"a": 3.0}), {"a"})
    found = explained(history)
    assert found.num_companions == 2
    assert found.companions == [Companion("mine", 1)]
    assert found.preemptions == [Preemption(ANOTHER, 1000.0)]
    assert "other" not in msgspec.json.encode(found).decode().replace("other_ms", "").replace(ANOTHER, "")


def test_the_clock_of_an_engine_that_takes_over_may_be_another() -> None:
    history = RequestHistory("a")
    history(step(100.0, share("a"), joined={"a": 0.5}))
    history(step(7.0, share("a", 0, 2), joined={"a": 9.0}))
    found = explained(history)
    assert (found.queued_ms, found.total_ms, found.other_ms) == (500.0, 10_000.0, 7500.0)


@settings(deadline=None, max_examples=examples(60))
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    asked=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=6),
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(1, 3),
    chunk=st.integers(2, 8),
)
def test_an_explanation_agrees_with_what_was_delivered(
    policy: str, asked: list[tuple[int, int, int]], num_blocks: int, max_num_seqs: int, chunk: int
) -> None:
    """Whatever the schedule: the parts sum up, and counts are those of the scheduler; each ends after its arrival."""
    harness = Harness(policy=policy, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_chunk_tokens=chunk)
    histories = {f"r{number}": RequestHistory(f"r{number}") for number in range(len(asked))}
    harness.engine.observers = [*histories.values()]
    requests = {}
    for number, (num_prompt_tokens, max_tokens, pause) in enumerate(asked):
        requests[f"r{number}"] = harness.add(f"r{number}", [number] * num_prompt_tokens, max_tokens, client=f"{pause}")
        for _ in range(pause):
            harness.step()
    harness.drain()
    for request_id, request in requests.items():
        found = explained(histories[request_id])
        parts = found.queued_ms + found.prefill_ms + found.decode_ms + found.preempted_ms + found.other_ms
        assert abs(parts - found.total_ms) < 0.01
        assert found.num_output_tokens == len(harness.token_ids[request_id])
        assert found.num_cached_tokens == request.num_cached_tokens
        assert found.num_preemptions <= request.num_preemptions
        assert (found.num_preemptions > 0) == (len(found.preemptions) > 0)
        assert all(one.ms is not None for one in found.preemptions)
        assert found.num_prefill_chunks + found.num_decode_steps >= found.num_output_tokens
        again = msgspec.json.decode(msgspec.json.encode(found), type=Explanation)
        assert again == found
