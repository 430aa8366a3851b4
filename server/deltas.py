"""What is new in the choices of one call: outputs of the engine go in, and deltas that are due come out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

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
        self._is_in_order = False
        self._rest: Iterator[Delta] | None = None  # of the outputs that were taken
        self._pending: dict[int, Delta] = {}  # by the index of the choice; not due yet

    def keep_order(self) -> None:
        """Have a delta, and what is known when it is taken, depend on the tokens before it alone.

        They come a token at a time, of each unfinished choice in turn.
        """
        self._is_in_order = True
        self._outputs = InOrder(self._choices, self._outputs)

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
            if num_scored >= MAX_SCORED or (due and self._is_in_order):
                break
        else:
            self._rest = None
        return self._take_due() if coalesces else due

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


class InOrder:
    """Outputs of one token, of each unfinished choice in turn, however they come.

    How many tokens come together depends on drafts, and which choice is ahead on rows and cache.
    """

    def __init__(self, choices: Mapping[str, Choice], outputs: Callable[[], Iterable[RequestOutput]]) -> None:
        self._choices = choices
        self._outputs = outputs
        self._waiting: dict[str, deque[RequestOutput]] = {request_id: deque() for request_id in choices}
        self._turns = deque(choices)

    def __call__(self) -> Iterator[RequestOutput]:
        for output in self._outputs():
            self._waiting[output.request_id] += _singles(output)
        return self._next()

    def _next(self) -> Iterator[RequestOutput]:
        while self._turns:
            request_id = self._turns[0]
            if self._choices[request_id].is_finished:
                self._turns.popleft()
            elif self._waiting[request_id]:
                self._turns.rotate(-1)
                yield self._waiting[request_id].popleft()
            else:
                return


def _singles(output: RequestOutput) -> list[RequestOutput]:
    """An output token by token; what tells of the prompt alone has come into the journal, and is none."""
    last = len(output.token_ids) - 1
    if last < 1:
        return [output] if output.token_ids or output.finish_reason else []
    return [
        replace(
            output,
            token_ids=[token_id],
            finish_reason=output.finish_reason if at == last else None,
            logprobs=output.logprobs and [output.logprobs[at]],
        )
        for at, token_id in enumerate(output.token_ids)
    ]
