"""What is drawn of the engine's steps, before it is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.steps import EngineRequest, Row, Step
from shoal.loadtest.timeline import Bar, Work, bars, batch_starts, course, window
from tests.loadtest.made_runs import make_run

SECONDS = 1.0


def a_row(
    row: int, name: str, tokens: int = 1, *, drafted: int = 0, samples: bool = True, padding: bool = False
) -> Row:
    return Row(name, row, tokens, drafted, samples, padding)


def a_step(start: float, *rows: Row, used: int = 0, kv_tokens: int = 0, seconds: float = SECONDS) -> Step:
    return Step(
        start=start,
        seconds=seconds,
        execute_seconds=seconds,
        rows=list(rows),
        num_waiting=0,
        num_blocks=10,
        num_used_blocks=used,
        num_kv_tokens=kv_tokens,
        num_pairs=0,
        num_keys=0,
        num_preemptions=0,
    )


def a_run(*steps: Step, stays: tuple[float, ...] = ()) -> Run:
    requests = {str(i): EngineRequest(str(i), 0.0, 1.0, 1.0 + stay) for i, stay in enumerate(stays)}
    requests["never joined"] = EngineRequest("never joined", 0.0, None, None)
    return Run(
        setup=Setup(policy="fcfs"),
        workload="w",
        load=Load(users=1),
        requests=[],
        steps=list(steps),
        engine_requests=requests,
    )


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (a_row(0, "a", 5), Work.PREFILL),
        (a_row(0, "a", 1, samples=False), Work.PREFILL),
        (a_row(0, "a", 1), Work.DECODE),
        (a_row(0, "a", 4, drafted=3), Work.DECODE),
        (a_row(0, "a", 4, drafted=2), Work.PREFILL),
        (a_row(0, "a", 1, padding=True), Work.PADDING),
    ],
)
def test_the_kind_of_work_of_a_row(row: Row, kind: Work) -> None:
    (bar,) = bars([a_step(0.0, row)])
    assert bar.work is kind


def test_a_static_batch_bar_by_bar() -> None:
    """Two requests of one and three tokens, whose rows are computed until the longer one ends; then another one."""
    steps = [
        a_step(0.0, a_row(0, "a", 4), a_row(1, "b", 2)),
        a_step(1.5, a_row(0, "a", padding=True), a_row(1, "b")),
        a_step(3.0, a_row(0, "a", padding=True), a_row(1, "b")),
        a_step(9.0, a_row(0, "c", 3)),
    ]
    assert bars(steps) == [
        Bar(0, 0, "a", Work.PREFILL, 0.0, 1.5),
        Bar(1, 0, "b", Work.PREFILL, 0.0, 1.5),
        Bar(0, 0, "a", Work.PADDING, 1.5, 4.0),
        Bar(1, 0, "b", Work.DECODE, 1.5, 4.0),
        Bar(0, 1, "c", Work.PREFILL, 9.0, 10.0),
    ]
    assert batch_starts(steps) == [0.0, 9.0]


def test_a_row_that_was_left_out_of_a_step_is_empty_then() -> None:
    steps = [a_step(0.0, a_row(0, "a")), a_step(1.0, a_row(1, "b")), a_step(2.0, a_row(0, "a"))]
    assert [(bar.request_id, bar.turn, bar.start, bar.end) for bar in bars(steps)] == [
        ("a", 0, 0.0, 1.0),
        ("b", 0, 1.0, 2.0),
        ("a", 0, 2.0, 3.0),
    ]


def test_a_request_that_takes_the_row_of_another_at_once_has_a_bar_of_its_own() -> None:
    found = bars([a_step(0.0, a_row(0, "a")), a_step(2.0, a_row(0, "b"))])
    assert found == [Bar(0, 0, "a", Work.DECODE, 0.0, 1.0), Bar(0, 1, "b", Work.DECODE, 2.0, 3.0)]


def test_bars_cover_the_steps_rows_and_nothing_twice() -> None:
    run = make_run("static")
    found = bars(run.steps)
    for step in run.steps:
        middle = step.start + step.seconds / 2
        there = sorted((bar.row, bar.request_id) for bar in found if bar.start <= middle < bar.end)
        assert there == [(row.row, row.request_id) for row in step.rows]


def test_the_window_ends_with_the_third_batch() -> None:
    batches = [a_step(5.0 * i + j, a_row(0, f"{i}")) for i in range(4) for j in range(3)]
    assert window(a_run(*batches)) == (0.0, 15.0)
    assert window(a_run(*batches[:9])) == (0.0, 13.0)  # three batches: the end of the run


def test_without_batches_the_window_is_three_median_stays() -> None:
    steps = [a_step(float(i), a_row(0, "a")) for i in range(50)]
    assert window(a_run(*steps, stays=(1.0, 4.0, 90.0))) == (0.0, 12.0)
    assert window(a_run(*steps, stays=(80.0,))) == (0.0, 50.0)
    assert window(a_run(*steps)) == (0.0, 50.0)


def test_the_course_is_the_mean_over_each_stretch() -> None:
    """Two rows for two seconds, the second of them padding in the second step; a pause of a second; another request."""
    steps = [
        a_step(0.0, a_row(0, "a"), a_row(1, "b"), used=4, kv_tokens=60),
        a_step(1.25, a_row(0, "a"), a_row(1, "b", padding=True), used=5, kv_tokens=70, seconds=0.75),
        a_step(3.0, a_row(0, "c"), used=1, kv_tokens=8),
    ]
    found = course(steps, block_size=16, until=5.0, num_stretches=5)
    np.testing.assert_allclose(found.times, [0.5, 1.5, 2.5, 3.5, 4.5])
    np.testing.assert_allclose(found.working, [2, 1.25, 0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(found.padding, [0, 0.75, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found.kv_owned, [0.4, 0.475, 0, 0.1, 0], atol=1e-12)
    np.testing.assert_allclose(found.kv_filled, [60 / 160, 67.5 / 160, 0, 8 / 160, 0], atol=1e-12)
