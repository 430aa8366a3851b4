"""The law of the simulated world, in many histories."""

from __future__ import annotations

import pytest

from tests.server import world

NUM_HISTORIES, NUM_PARTS = 2000, 8


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_request_that_was_accepted_ends_exactly_once(part: int) -> None:
    num_histories = NUM_HISTORIES // NUM_PARTS
    counts = world.play(num_histories, part * num_histories)
    assert counts["histories"] == num_histories
    assert counts["deaths"] > num_histories, "engines die"
    assert counts["errors"] < counts["requests"] / 3, "most requests live on"
