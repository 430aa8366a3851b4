"""From the hidden states of a prompt to one vector of length 1.

The states come chunk by chunk, as the prompt is scheduled.  What is added is added position by position, first to
last, and every operation is rounded on its own, so that the bits of a vector depend on nothing but its states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from shoal.model.step.batch import Float32
from shoal.scheduler.output import Pooling, ScheduledRequest


class Pool:
    """The hidden states of one prompt of `num_tokens` tokens, on their way to its vector."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self._pooling = pooling
        self._num_tokens = num_tokens
        self._num_added = 0
        self._vector = np.zeros(1)

    def num_states(self, start: int, count: int) -> int:
        """How many states it takes of a share of `count` tokens from position `start` on: always of the last ones."""
        match self._pooling.method:
            case "mean":
                return count
            case "cls":
                return count if start == 0 else 0
            case "last":
                return int(start + count == self._num_tokens)

    def add(self, start: int, count: int, states: Float32) -> bytes | None:
        """Take the states of a share; one that is computed again, since its step failed, counts once.

        Args:
            states: [num_states(start, count), hidden_size].

        Returns:
            The vector, float32 in little-endian order, if the share completes the prompt.
        """
        match self._pooling.method:
            case "mean":  # of which the length does not matter
                for state in states[self._num_added - start :]:
                    self._vector = self._vector + state
                self._num_added = start + count
            case "cls" if start == 0:
                self._vector = states[0].astype(np.float64)
            case "last" if len(states):
                self._vector = states[-1].astype(np.float64)
        return self._unit() if start + count == self._num_tokens else None

    def _unit(self) -> bytes:
        vector = self._vector[: self._pooling.num_dimensions]
        length = math.sqrt(np.cumsum(vector * vector)[-1])  # cumsum adds in order, and sum does not
        return (vector / (length or 1.0)).astype("<f4").tobytes()


def pool_all(
    pools: Mapping[int, Pool], scheduled: Sequence[ScheduledRequest], num_logits: Sequence[int], hidden: Float32
) -> dict[str, bytes]:
    """Divide the hidden states of a step among the pools, which are given by row; the vectors of complete prompts.

    Args:
        num_logits: of each request, whose states are as many.
        hidden: [sum of num_logits, hidden_size].
    """
    vectors: dict[str, bytes] = {}
    end = 0
    for share, num_states in zip(scheduled, num_logits, strict=True):
        end += num_states
        if share.row in pools:
            states, pool = hidden[end - num_states : end], pools[share.row]
            if vector := pool.add(share.num_computed_tokens, share.num_scheduled_tokens, states):
                vectors[share.request_id] = vector
    return vectors
