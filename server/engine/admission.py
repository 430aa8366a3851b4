"""Which requests are taken: bounds by number, by tokens that wait, and by the time until a request's turn.

A batch has `max_num_seqs` rows, and a request that finds none free waits until one is.  Its wait is estimated as the
time until enough of the requests ahead have ended.  Each of them goes on to its last token at the speed of a row, or
ends early, as often as requests did lately.  Speed and early ends are measured while all rows are taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import accumulate
from math import ceil, exp, inf

from shoal.scheduler.admission import check_queue, check_request
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import QueueFullError
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest

WINDOW_SECONDS = 10.0  # what was measured so long ago counts 1/e
LEAST_SECONDS = 1.0  # of a full batch in the window; with less of it nothing is known


class Drain:
    """How fast the rows of a full batch become free.

    After some time without a full batch nothing is known, so that no rate is stale, and an idle server takes a burst.
    """

    def __init__(self) -> None:
        self._noted_at = 0.0
        self._seconds = self._num_tokens = self._num_early_ends = 0.0

    def note(self, now: float, *, is_full: bool, num_tokens: int = 0) -> None:
        """Take in what came since the last call, in which the batch was full or was not."""
        passed, self._noted_at = now - self._noted_at, now
        kept = exp(-passed / WINDOW_SECONDS)
        self._seconds *= kept
        self._num_tokens *= kept
        self._num_early_ends *= kept
        if is_full:
            self._seconds += passed
            self._num_tokens += num_tokens

    def note_early_end(self) -> None:
        """A request in a full batch ended before it had all its tokens."""
        self._num_early_ends += 1

    def seconds(self, nums_left: Sequence[int], num_rows: int, num_ends: int) -> float:
        """Estimate the time until `num_ends` of these requests have ended; 0 if nothing is known.

        Args:
            nums_left: tokens that each may still get, in the order in which the requests find rows.
        """
        if self._seconds < LEAST_SECONDS or not self._num_tokens:
            return 0.0
        seconds_per_token = num_rows * self._seconds / self._num_tokens
        early_ends_per_second = max(self._num_early_ends, 1e-9) / self._seconds
        rows: list[float] = list(nums_left[:num_rows])
        waiting = iter(nums_left[num_rows:])
        heapify(rows)
        shortest = num_ends / early_ends_per_second
        for num_whole in range(1, num_ends + 1):
            whole = rows[0] * seconds_per_token  # until so many have had all their tokens
            shortest = min(shortest, max(whole, (num_ends - num_whole) / early_ends_per_second))
            heapreplace(rows, rows[0] + next(waiting, inf))
        return shortest


class Admission:
    """Refuses requests that can never be served, and those that would wait too long.

    Args:
        max_queue_seconds, max_queue_tokens: the settings of these names.
    """

    def __init__(self, max_queue_seconds: float = inf, max_queue_tokens: float = inf) -> None:
        self._max_seconds = max_queue_seconds
        self._max_tokens = max_queue_tokens
        self._drain = Drain()
        self._num_rows = 1
        self._is_full = False

    def begin(self, limits: SchedulerConfig, now: float) -> None:
        """An engine with these limits is there; the time before does not count."""
        self._num_rows = limits.max_num_seqs
        self.note(now, 0)

    def note(self, now: float, num_requests: int, num_tokens: int = 0) -> None:
        """Take in the tokens that have come since the last call, in which the engine had so many requests."""
        self._is_full = num_requests >= self._num_rows
        self._drain.note(now, is_full=self._is_full, num_tokens=num_tokens)

    def note_end(self, journal: Journal) -> None:
        """Take in that a request has ended, for whatever reason but that it gave way."""
        if self._is_full and not journal.gives_way and journal.output_token_ids and _num_left(journal):
            self._drain.note_early_end()

    def check(
        self, limits: SchedulerConfig, ahead: Sequence[Journal], requests: Sequence[EngineRequest], timeout: float
    ) -> None:
        """Refuse new requests, or any one more if none are given.

        Args:
            ahead: the unfinished requests, in order of arrival.
            timeout: seconds in which the new ones must be finished.

        Raises:
            InvalidRequestError: one can never be served.
            QueueFullError: they would wait too long; with the time after which there is room, as far as it is known.
        """
        for request in requests:
            check_request(limits, len(request.prompt_token_ids), request.params.max_tokens)
        num_rows, num_new = limits.max_num_seqs, max(len(requests), 1)

        def seconds(num_ends: int) -> float:
            if num_ends <= 0:
                return 0.0
            return self._drain.seconds([max(_num_left(one), 1) for one in ahead], num_rows, num_ends)

        try:
            check_queue(limits, len(ahead), num_new)
        except QueueFullError as error:
            error.retry_after = _whole(seconds(len(ahead) + num_new - num_rows - limits.max_num_waiting))
            raise
        waiting = list(accumulate(0 if one.output_token_ids else len(one.request.prompt_token_ids) for one in ahead))
        num_over = sum(len(one.prompt_token_ids) for one in requests) - self._max_tokens
        if waiting and waiting[-1] and waiting[-1] + num_over > 0:
            num_starts = bisect_left(waiting, min(waiting[-1] + num_over, waiting[-1])) + 1
            raise QueueFullError(
                f"the server is busy: {waiting[-1]} prompt tokens wait, and with those of this call they would exceed "
                f"max_queue_tokens ({self._max_tokens}); try again later",
                param="max_queue_tokens",
                retry_after=_whole(seconds(num_starts - num_rows)),
            )
        limit = min(self._max_seconds, timeout)
        wait = seconds(len(ahead) + 1 - num_rows)
        if wait > limit:
            name, its = ("max_queue_seconds", "") if limit == self._max_seconds else ("timeout", "its ")
            raise QueueFullError(
                f"the server is busy: the request's turn would come in {wait:.1f} s, but {its}{name} is {limit:g} s; "
                f"try again later",
                param=name,
                retry_after=_whole(wait - limit),
            )


def _num_left(journal: Journal) -> int:
    """Tokens that a request may still get."""
    return journal.request.params.max_tokens - len(journal.output_token_ids)


def _whole(seconds: float) -> int:
    return max(ceil(seconds), 1)
