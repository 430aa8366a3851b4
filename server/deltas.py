"""What is new in the choices of one call: outputs of the engine go in, and deltas that are due come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from shoal.scheduler.output import RequestOutput
from shoal.server.text import MAX_SCORED, Choice, Delta


class Deltas:
    """The deltas of one call.

    Args:
        choices: by the ids of their requests, in their order.
        outputs: returns those that have come since it was called last.
    """

    def __init__(self, choices: Mapping[str, Choice], outputs: Callable[[], Iterable[RequestOutput]]) -> None:
        self._choices = choices
        self._in_order = list(choices.values())
        self._outputs = outputs
        self._num_running = len(choices)
        self._rest: Iterator[Delta] | None = None  # of the outputs that were taken
        self._pending: dict[int, Delta] = {}  # by the index of the choice; not due yet

    @property
    def are_finished(self) -> bool:
        return self._num_running == 0

    @property
    def has_rest(self) -> bool:
        """Whether `take` has more to give of what has come already."""
        return self._rest is not None

    def take(self, *, coalesces: bool) -> list[Delta]:
        """What is due of what has come; of much the first part, so that others can have their turn after it.

        Args:
            coalesces: whether all that is new in a choice is one delta, or each output has its own.
        """
        due: list[Delta] = []
        num_scored = 0
        if self._rest is None:
            self._rest = self._feed(self._outputs())
        for delta in self._rest:
            pending = self._pending.setdefault(delta.index, delta)
            if pending is not delta:
                pending.add(delta)
            if not coalesces:
                due += self._take_due()
            num_scored += len(delta.scored)
            if num_scored >= MAX_SCORED:
                break
        else:
            self._rest = None
        return due + self._take_due()

    def _take_due(self) -> list[Delta]:
        due = []
        for index, delta in list(self._pending.items()):
            choice = self._in_order[index]
            if choice.is_due(delta):
                del self._pending[index]
                delta.token_ids = choice.take_token_ids()
                due.append(delta)
        return due

    def _feed(self, outputs: Iterable[RequestOutput]) -> Iterator[Delta]:
        for output in outputs:
            choice = self._choices[output.request_id]
            if choice.is_finished:
                continue
            for delta in choice.feed(output):
                if delta.finish_reason:
                    self._num_running -= 1
                yield delta
