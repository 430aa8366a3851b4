"""Progress bars: one for the comparison, one for the run."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

from shoal.loadtest.comparison import describe
from shoal.loadtest.plan import PlannedRun


class Bars:
    """Bars on standard error for the length of a `with` block.

    Args:
        num_requests: of each run.
    """

    def __init__(self, num_requests: int) -> None:
        self._num_requests = num_requests

    def __enter__(self) -> Self:
        self._runs = tqdm(total=0, unit="run", desc="comparison", position=0)
        self._requests = tqdm(total=self._num_requests, unit="request", position=1, leave=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._requests.close()
        self._runs.close()

    def expect(self, num_runs: int) -> None:
        self._runs.total += num_runs
        self._runs.refresh()

    def begin(self, planned: PlannedRun) -> None:
        self._requests.reset()
        self._requests.set_description(describe(planned))

    def observe(self, num_requests: int) -> None:
        self._requests.update(num_requests - self._requests.n)

    def end(self) -> None:
        self._runs.update()
