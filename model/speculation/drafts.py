"""What an executor asks of whoever proposes tokens."""

from __future__ import annotations

from typing import Protocol

from shoal.model.step.batch import Backend, ForwardBatch, SamplerOutput, SamplingBatch
from shoal.model.step.layout import StepLayout
from shoal.scheduler.output import ScheduledRequest, StepResult


class Drafts(Protocol):
    """Takes part in each step: before it, in its choices, and after it."""

    def place(self, share: ScheduledRequest) -> None:
        """Take note of a request's share of the next step, in which it joins or gets blocks."""
        ...

    def leave(self, row: int) -> None:
        """Take note that the request in the row, if there is one, leaves the batch."""
        ...

    def execute(
        self,
        backend: Backend,
        batch: ForwardBatch,
        sampling: SamplingBatch,
        scheduled: list[ScheduledRequest],
        layout: StepLayout,
    ) -> SamplerOutput:
        """Compute the step; an accepted drafted token is the token chosen at its place."""
        ...

    def propose(self, scheduled: list[ScheduledRequest], result: StepResult) -> list[list[int]]:
        """Draft what may follow the tokens that a step has chosen; parallel to `scheduled`, or empty if nothing is."""
        ...
