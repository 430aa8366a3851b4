"""Many steps at once, where steps do nothing but decode: for simulations, which need not play each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shoal.scheduler.output import FinishReason, SchedulerOutput
from shoal.scheduler.request import Request, RequestStatus
from shoal.scheduler.scheduler import Scheduler


class LeapingScheduler(Scheduler):
    """A scheduler that can also take plain steps together, with the same outcome as one by one.

    In a plain step each running request decodes one token, and nobody joins or gives way.  The step after a plain one
    is plain too unless a request comes or ends, or a block is wanted that is not there, if the policy is steady.
    """

    _blocked: Request | None = None  # the first waiting request, if the last step was plain and did not admit it

    def schedule(self, now: float) -> SchedulerOutput:
        output = super().schedule(now)
        is_plain = not output.preempted and all(
            share.num_scheduled_tokens == 1 and share.new is None for share in output.scheduled
        )
        self._blocked = self._first_waiting() if is_plain else None
        return output

    @property
    def num_plain_steps(self) -> int:
        """How many plain steps follow at least, if no request comes or ends before the last of them is over."""
        config, cache = self.config, self.kv_cache
        if self.padding or not self.policy.is_steady or not all(group.sees_all for group in config.cache_groups):
            return 0
        if not self.running or self._first_waiting() is not self._blocked:
            return 0
        if any(not _decodes(request) for request in self.running.values()):
            return 0
        # Each request gains at most one block, and then one in `block_size` steps.
        num_free = cache.pool.num_available - cache.num_promised
        return num_free // (len(self.running) * len(config.cache_groups)) * config.block_size

    def leap(
        self, num_steps: int, seconds: Iterable[float], choose: Callable[[Request, int], Sequence[int]]
    ) -> list[Request]:
        """Take plain steps at once, at most `num_plain_steps`; returns the requests that end in the last of them.

        Args:
            seconds: of each step.
            choose: returns the next tokens of a request, one for each step; none but the last may end it.
        """
        num_rows = len(self.running)
        self._pacing.learn_plain(num_rows, seconds)
        ended: list[tuple[Request, FinishReason]] = []
        for request in self.running.values():
            token_ids, before = choose(request, num_steps), request.num_computed_tokens
            request.token_ids.extend(token_ids[:-1])
            reserved = self.kv_cache.reserve(request)
            assert reserved is not None, "the leap is too long"
            reason, _ = self._append(request, [token_ids[-1]])
            self.policy.on_progress(request, num_steps)
            request.num_computed_tokens = before + num_steps
            self.kv_cache.advance(request, before)
            if reason is not None:
                ended.append((request, reason))
        for request, reason in ended:
            self._end(request, reason)
        self._counts.num_steps += num_steps
        self._counts.num_step_tokens += num_steps * num_rows
        return [request for request, _ in ended]

    def _first_waiting(self) -> Request | None:
        return next(iter(self.waiting.values()), None)

    def _leave(self, request: Request, status: RequestStatus) -> None:
        super()._leave(request, status)
        self._blocked = None


def _decodes(request: Request) -> bool:
    return request.num_prompt_tokens <= request.num_computed_tokens == request.num_tokens - 1
