"""How many engines are needed, by what is seen of those that there are, and when that is acted upon."""

from __future__ import annotations

from collections import deque
from math import ceil
from statistics import fmean

QUEUE_SECONDS, KV_CACHE_USAGE = 1.0, 0.7  # that the mean over the engines should have
INTERVAL_SECONDS, LOOK_BACK_SECONDS = 1, 5  # engines are looked at so often, and what was seen counts for so long
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 5, 30  # for which another number must be needed until there is


def needed(num_engines: int, queue_seconds: float, kv_cache_usage: float) -> int:
    """The number of engines with which the means of both would be what they should be, each being shared out.

    Args:
        queue_seconds: for how long the oldest of the requests that wait has waited, the mean over the engines.
        kv_cache_usage: share of the blocks that requests own, likewise.
    """
    return max(1, ceil(num_engines * max(queue_seconds / QUEUE_SECONDS, kv_cache_usage / KV_CACHE_USAGE)))


class Autoscaler:
    """Decides as Ray Serve does with `needed` for its policy: a new number must be needed for a while.

    Args:
        least, most: engines.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._seen: deque[tuple[float, float]] = deque(maxlen=LOOK_BACK_SECONDS // INTERVAL_SECONDS)
        self._num_seconds = 0  # for which more engines were needed; negative, fewer

    def decide(self, num_engines: int, queue_seconds: float, kv_cache_usage: float) -> int:
        """The number of engines that there should be; to be asked each `INTERVAL_SECONDS`.

        Args:
            num_engines: that there are, or are starting.
            queue_seconds, kv_cache_usage: as `needed` takes them, at this moment.
        """
        self._seen.append((queue_seconds, kv_cache_usage))
        means = (fmean(values) for values in zip(*self._seen, strict=True))
        wanted = min(max(needed(num_engines, *means), self._least), self._most)
        if wanted > num_engines:
            self._num_seconds = max(self._num_seconds, 0) + INTERVAL_SECONDS
        elif wanted < num_engines:
            self._num_seconds = min(self._num_seconds, 0) - INTERVAL_SECONDS
        else:
            self._num_seconds = 0
        if not -DOWNSCALE_SECONDS < self._num_seconds < UPSCALE_SECONDS:
            self._num_seconds = 0
            return wanted
        return num_engines
