"""The law of the simulated world, in many histories."""

from __future__ import annotations

import pytest

from tests.server import world

NUM_HISTORIES, NUM_PARTS = 8000, 8
PARTS = [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, NUM_PARTS))]


@pytest.mark.parametrize("part", PARTS)
def test_every_request_that_was_accepted_ends_exactly_once(part: int) -> None:
    num_histories = NUM_HISTORIES // NUM_PARTS
    counts = world.play(num_histories, part * num_histories)
    assert counts["histories"] == num_histories
    assert counts["deaths"] > num_histories, "engines die"
    assert counts["errors"] < counts["requests"] / 3, "most requests live on"
