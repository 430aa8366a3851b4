"""What OpenAI's Files API and Batch API take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Required, TypedDict, TypeVar

from shoal.clients.conversations import Response
from shoal.clients.errors import ApiError
from shoal.clients.types import Completion, Embeddings

T = TypeVar("T")


class BatchLine(TypedDict):
    """A request of a batch: `method` is "POST", `url` such as "/v1/chat/completions", `body` what is sent there."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class ListOptions(TypedDict, total=False):
    """Which part of a list is wanted: `limit` entries behind the one with the id `after`."""

    after: str
    limit: int


class OrderedListOptions(ListOptions, total=False):
    """`order` is "desc", the newest first, or "asc"."""

    order: str


class FileListOptions(OrderedListOptions, total=False):
    """`purpose` is "batch" or "batch_output"."""

    purpose: str


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list; the next one is that `after` its `last_id`."""

    data: tuple[T, ...]
    has_more: bool
    last_id: str | None


@dataclass(frozen=True, slots=True)
class File:
    """A file that the server keeps; `created_at` is in seconds since the epoch."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str


class BatchError(TypedDict, total=False):
    """What is wrong with a line of a batch."""

    code: Required[str]
    message: Required[str]
    param: str | None
    line: int | None


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """How many lines a batch has, and how many of them have their answers."""

    total: int
    completed: int
    failed: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Many requests in a file; times are seconds since the epoch.

    Attributes:
        status: "validating", "in_progress", "finalizing", "cancelling", or one of those in which it has ended:
            "completed", "failed", "expired", "cancelled".
        errors: why it is "failed".
    """

    id: str
    endpoint: str
    status: str
    input_file_id: str
    completion_window: str
    created_at: int
    request_counts: RequestCounts
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    expires_at: int | None = None
    completed_at: int | None = None
    metadata: dict[str, str] | None = None

    @property
    def is_ended(self) -> bool:
        return self.status in ("failed", "completed", "expired", "cancelled")

    @property
    def result_file_ids(self) -> tuple[str, ...]:
        return tuple(one for one in (self.output_file_id, self.error_file_id) if one is not None)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of one line: an `answer` or an `error`, which is a `StatusError` if the line was run."""

    custom_id: str
    answer: Completion[Any] | Response | Embeddings | None = None
    error: ApiError | None = None
