"""How a request learns of its steps: the engine sends their records, and the API process keeps the history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shoal.scheduler.engine import EngineCore
from shoal.scheduler.explanation import RequestHistory
from shoal.scheduler.step_record import StepRecord
from shoal.server.engine.messages import EngineRequest

if TYPE_CHECKING:  # an engine has none, and need not load what they are made of
    from shoal.server.engine.submission import Submission


class WantedSteps:
    """Keeps the record of a step in which a request is that wants to know: an observer of an `EngineCore`.

    It observes only while such a request is unfinished, so that other steps have no record and cost no more.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._wanting: set[str] = set()
        self._step: StepRecord | None = None

    def expect(self, request: EngineRequest) -> None:
        """Keep the steps of a request that has just come, if it wants them."""
        if not request.timing:
            return
        if not self._wanting:
            self._core.observers = [*self._core.observers, self]
        self._wanting.add(request.request_id)

    def __call__(self, record: StepRecord) -> None:
        served = {share.request_id for share in record.shares}
        if not self._wanting.isdisjoint(served) or not self._wanting.isdisjoint(record.gave_way_to):
            self._step = record
        scheduler = self._core.scheduler
        self._wanting = {one for one in self._wanting if one in scheduler.running or one in scheduler.waiting}
        if not self._wanting:
            self._core.observers = [observer for observer in self._core.observers if observer is not self]

    def take(self) -> StepRecord | None:
        """The record of the last step, once, if it is wanted."""
        step, self._step = self._step, None
        return step


def tell_histories(step: StepRecord, unfinished: Mapping[str, Submission], *, names_all: bool) -> None:
    """Add a step to the histories of the requests that want it.

    Args:
        unfinished: the requests of the engine.
        names_all: whether a history may name the requests of other clients.
    """
    involved = {*(share.request_id for share in step.shares), *step.gave_way_to, *step.gave_way_to.values()}
    journals = {one: unfinished[one].journals[one] for one in involved if one in unfinished}
    of_client: dict[str, set[str]] = {}
    for request_id, journal in journals.items():
        of_client.setdefault(journal.request.scheduling.client, set()).add(request_id)
    for request_id, journal in journals.items():
        if journal.request.timing:
            if journal.history is None:
                journal.history = RequestHistory(request_id)
            journal.history(step, None if names_all else of_client[journal.request.scheduling.client])
