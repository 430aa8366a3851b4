"""When engines are started and stopped, as Serve's controller does it."""

from __future__ import annotations

from shoal.scheduler.autoscaling import DOWNSCALE_SECONDS, KV_CACHE_USAGE, QUEUE_SECONDS, UPSCALE_SECONDS, Autoscaler


def test_more_engines_start_once_they_have_been_needed_for_a_while() -> None:
    autoscaler = Autoscaler(1, 8)
    decided = [autoscaler.decide(2, 2 * QUEUE_SECONDS, 0.0) for _ in range(UPSCALE_SECONDS)]
    assert decided == [2] * (UPSCALE_SECONDS - 1) + [4]


def test_engines_stop_later_than_they_start() -> None:
    autoscaler = Autoscaler(1, 8)
    decided = [autoscaler.decide(4, 0.0, KV_CACHE_USAGE / 2) for _ in range(DOWNSCALE_SECONDS)]
    assert decided == [4] * (DOWNSCALE_SECONDS - 1) + [2]


def test_a_need_that_passes_starts_nothing() -> None:
    autoscaler = Autoscaler(1, 8)
    for _ in range(20):
        assert autoscaler.decide(2, 3.0, 0.0) == 2
        for _ in range(10):
            assert autoscaler.decide(2, 0.0, KV_CACHE_USAGE) == 2


def test_the_bounds_are_kept() -> None:
    busy, idle = Autoscaler(2, 3), Autoscaler(2, 3)
    assert [busy.decide(2, 100.0, 1.0) for _ in range(UPSCALE_SECONDS)][-1] == 3
    assert [idle.decide(3, 0.0, 0.0) for _ in range(DOWNSCALE_SECONDS)][-1] == 2
