"""Requests that end at an exact length, for load tests in which every policy is to do the same work.

And requests whose engine dies, for tests of what becomes of them.
"""

from __future__ import annotations

import os
import signal
from math import inf

from shoal.scheduler.engine import Executor
from shoal.scheduler.output import ScheduledRequest, SchedulerOutput, StepResult
from shoal.server.engine.messages import EngineRequest


class Endings:
    """An executor around another, which has a request's model choose end-of-text as its `end_after`-th token.

    It changes nothing but what comes of a step: scheduler, policy and predictor see a request like any other, and
    learn of its length when it ends.  Lengths are counted from the prompt, so that it does not matter over which
    steps, preemptions and engines the tokens before were spread.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._ends: dict[str, tuple[int, int]] = {}  # number of tokens with the last, and which that is
        self._deaths: dict[str, int] = {}  # number of tokens after which the process dies

    def expect(self, request: EngineRequest) -> None:
        """Note when a request is to end, or the engine with it, if it says so."""
        if request.die_after is not None:
            self._deaths[request.request_id] = len(request.prompt_token_ids) + request.die_after
        if request.end_after is not None:
            num_tokens = len(request.prompt_token_ids) + request.end_after
            self._ends[request.request_id] = num_tokens, min(request.params.stop_token_ids)

    def forget(self, request_id: str) -> None:
        """The request has ended, however it did."""
        self._ends.pop(request_id, None)
        self._deaths.pop(request_id, None)

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute a step.  See `shoal.scheduler.engine.Executor`."""
        if self._deaths and any(_known(share) >= self._deaths.get(share.request_id, inf) for share in output.scheduled):
            os.kill(os.getpid(), signal.SIGKILL)
        result = self._executor.execute(output)
        if self._ends:
            for share, token_ids in zip(output.scheduled, result.token_ids, strict=True):
                if token_ids and share.request_id in self._ends:
                    num_tokens, stop_token_id = self._ends[share.request_id]
                    known = _known(share)
                    if known + len(token_ids) >= num_tokens:
                        token_ids[num_tokens - known - 1 :] = [stop_token_id]
        return result


def _known(share: ScheduledRequest) -> int:
    """The tokens that are computed with this step, without drafted ones."""
    return share.num_computed_tokens + share.num_scheduled_tokens - len(share.spec_token_ids)
