"""Files and batches, as OpenAI's API defines them, and the lines of the files of a batch."""

from __future__ import annotations

import re
from typing import Annotated, Generic, Literal, TypeVar

from msgspec import Meta, Raw, Struct, field

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body

MAX_FILE_BYTES = 200 * 2**20
MAX_LINES = 50_000
MAX_NAME_CHARS = 255
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = "[1-9][0-9]{0,3}[smhd]"

Item = TypeVar("Item")
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


# -- requests ------------------------------------------------------------------------------------------------------


class BatchBody(Body, kw_only=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Annotated[str, Meta(extra_json_schema={"pattern": f"^{_WINDOW}$"})]
    metadata: Metadata | None = None

    @property
    def seconds(self) -> int:
        """The completion window; `check` has seen that it is one."""
        return int(self.completion_window[:-1]) * _SECONDS[self.completion_window[-1]]

    def check(self) -> None:
        if not re.fullmatch(_WINDOW, self.completion_window):
            raise InvalidRequestError("completion_window: expected a time such as '24h'", param="completion_window")


class FileQuery(Body):
    """What GET /v1/files lists."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class BatchQuery(Body):
    """What GET /v1/batches lists."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20


class InputLine(Body, kw_only=True):
    """A line of an input file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Raw]

    def check(self) -> None:
        if bytes(self.body.get("stream", b"")) not in (b"", b"null", b"false"):
            raise InvalidRequestError("body.stream: a batch has no streams", param="body")


# -- answers -------------------------------------------------------------------------------------------------------


class FileObject(Struct, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class Deleted(Struct):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchError(Struct):
    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(Struct):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(Struct, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    model: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


class Page(Struct, Generic[Item]):
    """A part of a list; `after` its `last_id` comes the next."""

    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"
