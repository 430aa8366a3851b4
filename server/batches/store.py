"""Files, batches and their lines, kept in an SQLite database."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, TypeVar

import msgspec

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.batches.lines import Line, read_lines, unanswered
from shoal.server.errors import BatchesUnavailableError, NotFoundError
from shoal.server.wire.batches import (
    Batch,
    BatchBody,
    BatchError,
    BatchErrors,
    BatchQuery,
    FileObject,
    FileQuery,
    Page,
)

MAX_ERRORS = 100  # of a file that is no batch
PIECE_BYTES = 64 * 1024
NUM_PIECES = 16  # that are read at once
# A file is made of pieces: an upload of equal ones, an output or error file of one for each line.  A line that waits is
# a row of `lines`.  What ends it moves it to a piece in one transaction, so that it cannot be there twice, or be lost.
_SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    value BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS objects_by_state ON objects (kind, state);
CREATE TABLE IF NOT EXISTS pieces (
    file_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (file_id, number)
);
CREATE TABLE IF NOT EXISTS lines (
    batch_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY (batch_id, number),
    UNIQUE (batch_id, custom_id)
);
"""

Kept = TypeVar("Kept", FileObject, Batch)
Answer = TypeVar("Answer")


class BatchStore:
    """The store of one folder, which one process has at a time.  Each call is a transaction.

    Args:
        folder: made if it is missing.
        clock: returns seconds since 1970.

    Raises:
        BatchesUnavailableError: another process has the folder.
        OSError, sqlite3.Error: it cannot be written to; from any method, too.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as opened:
            lock = opened.enter_context((folder / "lock").open("wb"))
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise BatchesUnavailableError("another server has this server's data_folder") from None
            self._database = opened.enter_context(closing(sqlite3.connect(database_path(folder))))
            self._database.executescript(_SCHEMA)
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    # -- files -----------------------------------------------------------------------------------------------------

    def add_file(self, owner: str, filename: str, source: BinaryIO) -> FileObject:
        """Keep what is read of an uploaded file."""
        file = FileObject(
            id=f"file-{token_hex(12)}", bytes=0, created_at=self._now(), filename=filename, purpose="batch"
        )
        with self._database:
            for number, data in enumerate(iter(partial(source.read, PIECE_BYTES), b"")):
                self._add_piece(file.id, number, data)
                file.bytes += len(data)
            self._add(owner, file, file.purpose)
        return file

    def file(self, owner: str, file_id: str) -> FileObject:
        """Raises NotFoundError if this owner has none of this id, as all methods that take both."""
        return self._find(FileObject, file_id, owner)

    def files(self, owner: str, query: FileQuery) -> Page[FileObject]:
        return self._page(FileObject, owner, query)

    def delete_file(self, owner: str, file_id: str) -> None:
        """Forget a file; a batch that was made of it has its own copy of the lines once it was validated."""
        self._find(FileObject, file_id, owner)
        with self._database:
            self._database.execute("DELETE FROM objects WHERE id = ?", (file_id,))
            self._database.execute("DELETE FROM pieces WHERE file_id = ?", (file_id,))

    def pieces(self, file_id: str, after: int = -1) -> list[tuple[int, bytes]]:
        """The next pieces of a file behind the one of this number, with their numbers."""
        query = "SELECT number, data FROM pieces WHERE file_id = ? AND number > ? ORDER BY number LIMIT ?"
        return self._database.execute(query, (file_id, after, NUM_PIECES)).fetchall()

    # -- batches, for their owners -----------------------------------------------------------------------------------

    def add_batch(self, owner: str, body: BatchBody, model: str) -> Batch:
        """Keep a batch that is to be validated, and run by a server of this model."""
        if self._find(FileObject, body.input_file_id, owner).purpose != "batch":
            raise InvalidRequestError("input_file_id: expected a file of purpose 'batch'", param="input_file_id")
        now = self._now()
        batch = Batch(
            id=f"batch_{token_hex(12)}",
            endpoint=body.endpoint,
            model=model,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + body.seconds,
            metadata=body.metadata,
        )
        with self._database:
            self._add(owner, batch, batch.status)
        return batch

    def batch(self, owner: str, batch_id: str) -> Batch:
        return self._find(Batch, batch_id, owner)

    def batches(self, owner: str, query: BatchQuery) -> Page[Batch]:
        return self._page(Batch, owner, query)

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Ask for the end of a batch, which `finish` brings.

        Raises:
            InvalidRequestError: it has ended already.
        """
        batch = self._find(Batch, batch_id, owner)
        if batch.status in ("validating", "in_progress"):
            batch.status, batch.cancelling_at = "cancelling", self._now()
            with self._database:
                self._save(batch)
        elif batch.status != "cancelling":
            raise InvalidRequestError(f"the batch cannot be cancelled: it is {batch.status} already")
        return batch

    # -- batches, for those who run them -----------------------------------------------------------------------------

    def unfinished(self) -> list[tuple[str, Batch]]:
        """Batches that have not ended, oldest first, with their owners."""
        rows = self._database.execute(
            "SELECT owner, value FROM objects WHERE kind = 'Batch' AND state IN ('validating', 'in_progress', "
            "'cancelling') ORDER BY number"
        )
        return [(owner, msgspec.json.decode(value, type=Batch)) for owner, value in rows]

    def validate(self, batch_id: str, max_bytes: int) -> None:
        """Copy the lines of the input file, or say what is wrong with them.

        Args:
            max_bytes: of a line.
        """
        batch = self._find(Batch, batch_id)
        if batch.status != "validating":
            return
        errors: list[BatchError] = []
        with self._database:
            for line in read_lines(self._all_pieces(batch.input_file_id), batch.endpoint, max_bytes):
                if error := line if isinstance(line, BatchError) else self._add_line(batch, line):
                    errors.append(error)
                if len(errors) == MAX_ERRORS:
                    break
            if not errors and not batch.request_counts.total:
                errors.append(BatchError("empty_batch", "the file has no requests"))
            if errors:
                self._database.rollback()
                batch.status, batch.failed_at, batch.errors = "failed", self._now(), BatchErrors(errors)
                batch.request_counts.total = 0
            else:
                batch.status, batch.in_progress_at = "in_progress", self._now()
            self._save(batch)

    def lines(self, batch_id: str, limit: int) -> list[Line]:
        """The first lines that were not answered yet."""
        query = "SELECT number, custom_id, body FROM lines WHERE batch_id = ? ORDER BY number LIMIT ?"
        return [Line(*row) for row in self._database.execute(query, (batch_id, limit))]

    def commit(self, batch_id: str, number: int, data: bytes, *, is_error: bool) -> bool:
        """Take in the answer to a line; returns False if it has one already."""
        with self._database:
            query = "DELETE FROM lines WHERE batch_id = ? AND number = ?"
            if not self._database.execute(query, (batch_id, number)).rowcount:
                return False
            batch = self._find(Batch, batch_id)
            self._add_piece(_result_id(batch_id, "error" if is_error else "output"), number, data)
            batch.request_counts.completed += not is_error
            batch.request_counts.failed += is_error
            self._save(batch)
        return True

    def finish(self, batch_id: str) -> None:
        """End a batch that is cancelled, expired or answered: its files have a line for each request."""
        batch = self._find(Batch, batch_id)
        now = self._now()
        if batch.status == "cancelling":
            batch.status, batch.cancelled_at = "cancelled", now
        elif batch.request_counts.completed + batch.request_counts.failed < batch.request_counts.total:
            batch.status, batch.expired_at = "expired", now
        else:
            batch.status, batch.finalizing_at, batch.completed_at = "completed", now, now
        with self._database:
            rest = self._database.execute("SELECT number, custom_id FROM lines WHERE batch_id = ?", (batch_id,))
            for number, custom_id in rest.fetchall():
                message = f"the batch is {batch.status}, and this request has no answer"
                data = unanswered(custom_id, f"batch_{batch.status}", message)
                self._add_piece(_result_id(batch_id, "error"), number, data)
                batch.request_counts.failed += 1
            self._database.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))
            (owner,) = self._database.execute("SELECT owner FROM objects WHERE id = ?", (batch_id,)).fetchone()
            batch.output_file_id = self._add_result(owner, batch, "output")
            batch.error_file_id = self._add_result(owner, batch, "error")
            self._save(batch)

    # -- the parts -------------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return int(self._clock())

    def _find(self, kind: type[Kept], object_id: str, owner: str | None = None) -> Kept:
        query = "SELECT value FROM objects WHERE id = ? AND kind = ? AND coalesce(owner = ?, TRUE)"
        row = self._database.execute(query, (object_id, kind.__name__, owner)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no such object: {object_id[:100]!r}")
        return msgspec.json.decode(row[0], type=kind)

    def _page(self, kind: type[Kept], owner: str, query: FileQuery | BatchQuery) -> Page[Kept]:
        order, state = (query.order, query.purpose) if isinstance(query, FileQuery) else ("desc", None)
        if query.after is not None:
            self._find(kind, query.after, owner)
        rows = self._database.execute(
            "SELECT value FROM objects WHERE kind = ? AND owner = ? AND coalesce(state = ?, TRUE) "
            f"AND coalesce(number {'>' if order == 'asc' else '<'} (SELECT number FROM objects WHERE id = ?), TRUE) "
            f"ORDER BY number {order} LIMIT ?",
            (kind.__name__, owner, state, query.after, query.limit + 1),
        )
        found = [msgspec.json.decode(value, type=kind) for (value,) in rows]
        data = found[: query.limit]
        return Page(data, len(found) > query.limit, data[0].id if data else None, data[-1].id if data else None)

    def _add(self, owner: str, kept: FileObject | Batch, state: str) -> None:
        self._database.execute(
            "INSERT INTO objects (id, owner, kind, state, value) VALUES (?, ?, ?, ?, ?)",
            (kept.id, owner, type(kept).__name__, state, msgspec.json.encode(kept)),
        )

    def _save(self, batch: Batch) -> None:
        change = "UPDATE objects SET state = ?, value = ? WHERE id = ?"
        self._database.execute(change, (batch.status, msgspec.json.encode(batch), batch.id))

    def _add_piece(self, file_id: str, number: int, data: bytes) -> None:
        self._database.execute("INSERT INTO pieces VALUES (?, ?, ?)", (file_id, number, data))

    def _all_pieces(self, file_id: str) -> Iterator[bytes]:
        after = -1
        while pieces := self.pieces(file_id, after):
            yield from (data for _, data in pieces)
            after = pieces[-1][0]

    def _add_line(self, batch: Batch, line: Line) -> BatchError | None:
        try:
            self._database.execute("INSERT INTO lines VALUES (?, ?, ?, ?)", (batch.id, *line))
        except sqlite3.IntegrityError:
            message = f"custom_id: an earlier line has {line.custom_id[:100]!r}, too"
            return BatchError("duplicate_custom_id", message, "custom_id", line.number)
        batch.request_counts.total += 1
        return None

    def _add_result(self, owner: str, batch: Batch, kind: str) -> str | None:
        """Make a file of the pieces that the answers left; returns its id, or None if there are none."""
        file_id = _result_id(batch.id, kind)
        query = "SELECT sum(length(data)) FROM pieces WHERE file_id = ?"
        (size,) = self._database.execute(query, (file_id,)).fetchone()
        if size is None:
            return None
        name = f"{batch.id}_{kind}.jsonl"
        file = FileObject(id=file_id, bytes=size, created_at=self._now(), filename=name, purpose="batch_output")
        self._add(owner, file, file.purpose)
        return file_id


class Batches:
    """The store as the event loop asks it: a thread of its own answers.  It is opened when it is first asked.

    Attributes:
        changed: set when those who run batches should look.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.changed = asyncio.Event()
        self.clock = clock
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "batches")
        self._store: BatchStore | None = None

    @property
    def exist(self) -> bool:
        """Whether anything was ever kept."""
        return database_path(self._folder).exists()

    async def ask(self, question: Callable[[BatchStore], Answer]) -> Answer:
        """What the store answers.

        Raises:
            BatchesUnavailableError: another server has the folder, or the disk fails.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, question)
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error  # without the path
            raise BatchesUnavailableError(f"files and batches cannot be kept in data_folder: {reason}") from error

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _answer(self, question: Callable[[BatchStore], Answer]) -> Answer:
        if self._store is None:
            self._store = BatchStore(self._folder, self.clock)
        return question(self._store)

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()


def database_path(folder: Path) -> Path:
    return folder / "batches.sqlite3"


def _result_id(batch_id: str, kind: str) -> str:
    """The id of a batch's output or error file."""
    return f"file-{batch_id.removeprefix('batch_')}-{kind}"
