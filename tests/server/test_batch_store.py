"""The store of batches: any order of calls, crashes at any statement, and two servers at one folder."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.batches.store import PIECE_BYTES, Batches, BatchStore
from shoal.server.errors import BatchesUnavailableError, NotFoundError
from shoal.server.wire.batches import Batch, BatchBody, BatchQuery, FileQuery

URL = "/v1/completions"
WINDOW = 24 * 3600


def input_file(*custom_ids: str, end: str = "\n") -> bytes:
    rows = [{"custom_id": one, "method": "POST", "url": URL, "body": {"prompt": one}} for one in custom_ids]
    return "".join(json.dumps(row) + end for row in rows).encode()


def content(store: BatchStore, file_id: str | None) -> bytes:
    return b"" if file_id is None else b"".join(store._all_pieces(file_id))


def batch_of(store: BatchStore, owner: str, data: bytes) -> Batch:
    file = store.add_file(owner, "a.jsonl", io.BytesIO(data))
    return store.add_batch(owner, body_of(file.id), "fish")


def body_of(file_id: str) -> BatchBody:
    return BatchBody(input_file_id=file_id, endpoint=URL, completion_window="24h")


def everything(store: BatchStore) -> Any:
    """All that the database holds."""
    return [store._database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES]


TABLES = ("objects", "pieces", "lines")
crashes = st.none() | st.integers(1, 8)  # the statement of a change before which everything is killed


class Stores(RuleBasedStateMachine):
    """A store in which lines are answered, beside a record of what must be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.number = 0
        self.now = 1000.0
        self.store = self.open()
        self.lines: dict[str, dict[str, bytes | None]] = {}  # of each valid batch: its answers by custom_id
        self.validating: list[str] = []
        self.ended: dict[str, Batch] = {}

    def open(self) -> BatchStore:
        store = BatchStore(self.folder / str(self.number), lambda: self.now)
        store._database.execute("PRAGMA synchronous = OFF")  # a process dies here, and no machine
        return store

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def do(self, change: Callable[[BatchStore], Any], crash: int | None) -> Any:
        """Make a change; of a crash before its end nothing may be left.  Returns None then."""
        if crash is None:
            return change(self.store)
        before, here = everything(self.store), self.folder / str(self.number)
        self.number += 1
        statements: list[str] = []

        def count(statement: str) -> None:
            statements.append(statement)
            if len(statements) == crash:
                shutil.copytree(here, self.folder / str(self.number))

        self.store._database.set_trace_callback(count)
        result = change(self.store)
        self.store._database.set_trace_callback(None)
        after = everything(self.store)
        if len(statements) < crash:  # it is killed after the change
            shutil.copytree(here, self.folder / str(self.number))
        self.store.close()
        self.store = self.open()
        found = everything(self.store)
        assert found == (before if crash <= len(statements) else after)
        return result if found == after else None

    def batch(self, batch_id: str) -> Batch:
        return self.store.batch("me", batch_id)

    @precondition(lambda self: len(self.lines) + len(self.validating) < 3)
    @rule(num_lines=st.integers(0, 5), fault=st.sampled_from(["", "", "", "twice", "json"]), crash=crashes)
    def create(self, num_lines: int, fault: str, crash: int | None) -> None:
        ids = [f"line-{i}" for i in range(num_lines)]
        data = input_file(*ids, *(ids[:1] if fault == "twice" else [])) + (b"{" if fault == "json" else b"")
        file = self.do(lambda store: store.add_file("me", "x.jsonl", io.BytesIO(data)), crash)
        if file is None:
            return
        assert content(self.store, file.id) == data and file.bytes == len(data)
        batch = self.do(lambda store: store.add_batch("me", body_of(file.id), "fish"), crash)
        if batch is not None:
            self.validating.append(batch.id)

    @precondition(lambda self: len(self.lines) < 2)
    @rule(num_lines=st.integers(1, 5))
    def begin(self, num_lines: int) -> None:
        """Have a valid batch, so that most of what is tried is tried with lines."""
        batch = batch_of(self.store, "me", input_file(*(f"line-{i}" for i in range(num_lines))))
        self.validating.append(batch.id)
        self.check_validation(batch.id, None)

    @precondition(lambda self: self.validating)
    @rule(crash=crashes, data=st.data())
    def validate(self, crash: int | None, data: st.DataObject) -> None:
        self.check_validation(data.draw(st.sampled_from(self.validating)), crash)

    def check_validation(self, batch_id: str, crash: int | None) -> None:
        asked = content(self.store, self.batch(batch_id).input_file_id)
        self.do(lambda store: store.validate(batch_id, 1000), crash)
        batch = self.batch(batch_id)
        if batch.status == "validating":
            return
        self.validating.remove(batch_id)
        ids = [json.loads(line)["custom_id"] for line in asked.splitlines() if line != b"{"]
        if batch.status == "failed":
            assert batch.errors is not None and batch.failed_at == int(self.now)
            assert not ids or asked.endswith(b"{") or len(set(ids)) < len(ids)
            assert batch.request_counts.total == 0 and not self.store.lines(batch_id, 10)
            self.ended[batch_id] = batch
        else:
            assert batch.request_counts.total == len(ids) > 0 and batch.in_progress_at == int(self.now)
            self.lines[batch_id] = dict.fromkeys(ids)

    @precondition(lambda self: any(self.lines.values()))
    @rule(crash=crashes, is_error=st.booleans(), data=st.data())
    def commit(self, crash: int | None, is_error: bool, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from([one for one, lines in self.lines.items() if lines]))
        custom_id = data.draw(st.sampled_from(list(self.lines[batch_id])))
        number = int(custom_id.removeprefix("line-")) + 1
        answer = f"{custom_id} {self.number} {is_error}\n".encode()
        was_new = self.do(lambda store: store.commit(batch_id, number, answer, is_error=is_error), crash)
        if was_new:
            assert self.lines[batch_id][custom_id] is None
            self.lines[batch_id][custom_id] = answer
        elif was_new is False:
            assert self.lines[batch_id][custom_id] is not None

    @precondition(lambda self: self.lines or self.validating)
    @rule(crash=crashes, data=st.data())
    def cancel(self, crash: int | None, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from([*self.lines, *self.validating]))
        if self.do(lambda store: store.cancel("me", batch_id), crash) and batch_id in self.validating:
            self.validating.remove(batch_id)
            self.lines[batch_id] = {}
            self.finish_now(batch_id, None)

    @rule()
    def wait(self) -> None:
        self.now += WINDOW / 3

    @precondition(lambda self: self.lines)
    @rule(crash=crashes, data=st.data())
    def finish(self, crash: int | None, data: st.DataObject) -> None:
        self.finish_now(data.draw(st.sampled_from(list(self.lines))), crash)

    def finish_now(self, batch_id: str, crash: int | None) -> None:
        before = self.batch(batch_id)
        is_answered = all(answer is not None for answer in self.lines[batch_id].values())
        if not (is_answered or before.status == "cancelling" or self.now >= before.expires_at):
            return
        self.do(lambda store: store.finish(batch_id), crash)
        batch = self.batch(batch_id)
        if batch.status == before.status:
            return
        answers = self.lines.pop(batch_id)
        expected = "cancelled" if before.status == "cancelling" else "completed" if is_answered else "expired"
        assert batch.status == expected and getattr(batch, f"{expected}_at") == int(self.now)
        output, errors = content(self.store, batch.output_file_id), content(self.store, batch.error_file_id)
        rows = [*output.splitlines(keepends=True), *errors.splitlines(keepends=True)]
        unrun = [json.loads(row) for row in rows if row.startswith(b"{")]
        assert {row["error"]["code"] for row in unrun} <= {f"batch_{expected}"}
        assert sorted(row for row in rows if not row.startswith(b"{")) == sorted(filter(None, answers.values()))
        assert sorted(row["custom_id"] for row in unrun) == sorted(one for one, row in answers.items() if row is None)
        counts = batch.request_counts
        assert (counts.completed, counts.failed) == (len(output.splitlines()), len(errors.splitlines()))
        for file_id, data_ in ((batch.output_file_id, output), (batch.error_file_id, errors)):
            assert (file_id is None) == (not data_)
            assert file_id is None or self.store.file("me", file_id).bytes == len(data_)
        self.ended[batch_id] = batch

    @invariant()
    def the_store_holds_what_was_kept(self) -> None:
        for batch_id, answers in self.lines.items():
            counts = self.batch(batch_id).request_counts
            waiting = [one for one, answer in answers.items() if answer is None]
            assert [line.custom_id for line in self.store.lines(batch_id, 100)] == waiting
            assert counts.completed + counts.failed == len(answers) - len(waiting)
        assert {batch.id for _, batch in self.store.unfinished()} == {*self.lines, *self.validating}
        for batch_id, batch in self.ended.items():
            assert self.batch(batch_id) == batch
            with pytest.raises(InvalidRequestError, match="already"):
                self.store.cancel("me", batch_id)


TestStores = Stores.TestCase
TestStores.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    one = BatchStore(tmp_path / "a" / "b", lambda: 1000.0)
    yield one
    one.close()


def test_a_large_file_comes_back_as_it_was(store: BatchStore) -> None:
    data = bytes(range(256)) * (PIECE_BYTES // 64)
    file = store.add_file("me", "../../etc/passwd", io.BytesIO(data))
    assert (file.bytes, file.filename) == (len(data), "../../etc/passwd")
    assert content(store, file.id) == data
    store.delete_file("me", file.id)
    assert everything(store) == [[], [], []]


def test_each_sees_only_what_is_theirs(store: BatchStore) -> None:
    mine, theirs = batch_of(store, "me", input_file("a")), batch_of(store, "they", input_file("a"))
    assert [each.id for each in store.batches("me", BatchQuery()).data] == [mine.id]
    assert [each.id for each in store.files("they", FileQuery()).data] == [theirs.input_file_id]
    for ask in (
        lambda: store.batch("me", theirs.id),
        lambda: store.cancel("me", theirs.id),
        lambda: store.file("me", theirs.input_file_id),
        lambda: store.delete_file("me", theirs.input_file_id),
        lambda: store.batches("me", BatchQuery(after=theirs.id)),
        lambda: store.add_batch("me", body_of(theirs.input_file_id), "fish"),
        lambda: store.file("me", mine.id),
    ):
        with pytest.raises(NotFoundError):
            ask()


def test_lists_come_in_pages(store: BatchStore) -> None:
    ids = [store.add_file("me", str(i), io.BytesIO(b"x")).id for i in range(5)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        seen: list[str] = []
        after, more = None, True
        while more:
            page = store.files("me", FileQuery(after=after, limit=2, order=order))  # type: ignore[arg-type]
            seen += [file.id for file in page.data]
            after, more = page.last_id, page.has_more
            assert (page.first_id, page.last_id) == (page.data[0].id, page.data[-1].id)
        assert seen == expected
    empty = store.files("me", FileQuery(purpose="batch_output"))
    assert (empty.data, empty.has_more, empty.first_id, empty.last_id) == ([], False, None, None)


def test_an_output_is_no_input(store: BatchStore) -> None:
    batch = batch_of(store, "me", input_file("a"))
    store.validate(batch.id, 1000)
    store.commit(batch.id, 1, b"{}\n", is_error=False)
    store.finish(batch.id)
    output = store.batch("me", batch.id).output_file_id
    assert output is not None
    with pytest.raises(InvalidRequestError, match="purpose"):
        store.add_batch("me", body_of(output), "fish")


def test_a_file_may_go_once_its_batch_is_valid(store: BatchStore) -> None:
    batch, early = batch_of(store, "me", input_file("a", "b")), batch_of(store, "me", input_file("a"))
    store.delete_file("me", early.input_file_id)
    store.validate(early.id, 1000)
    errors = store.batch("me", early.id).errors
    assert errors is not None and [error.code for error in errors.data] == ["empty_batch"]
    store.validate(batch.id, 1000)
    store.delete_file("me", batch.input_file_id)
    assert [line.custom_id for line in store.lines(batch.id, 10)] == ["a", "b"]


def test_one_server_has_a_folder(tmp_path: Path) -> None:
    async def scene() -> None:
        first, second = Batches(tmp_path / "data"), Batches(tmp_path / "data")
        assert not first.exist and not (tmp_path / "data").exists()
        await first.ask(lambda store: store.unfinished())
        with pytest.raises(BatchesUnavailableError, match="another server"):
            await second.ask(lambda store: store.unfinished())
        await first.close()
        assert await second.ask(lambda store: store.unfinished()) == []
        await second.close()

    asyncio.run(scene())


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()

    async def scene() -> None:
        batches = Batches(tmp_path / where)
        with pytest.raises(BatchesUnavailableError, match="data_folder"):
            await batches.ask(lambda store: store.unfinished())
        await batches.close()

    asyncio.run(scene())


def test_a_full_disk_is_a_typed_error_and_loses_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        batches = Batches(tmp_path)
        await batches.ask(lambda store: store._database.execute("PRAGMA max_page_count = 40"))
        kept = await batches.ask(lambda store: store.add_file("me", "a", io.BytesIO(b"x" * 1000)))
        with pytest.raises(BatchesUnavailableError, match="full"):
            await batches.ask(lambda store: store.add_file("me", "b", io.BytesIO(b"y" * 1_000_000)))
        files = await batches.ask(lambda store: store.files("me", FileQuery()))
        assert [file.id for file in files.data] == [kept.id]
        assert await batches.ask(lambda store: len(store.pieces(kept.id))) == 1
        await batches.close()

    asyncio.run(scene())


def test_what_is_kept_outlives_the_process_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store = BatchStore(folder)
    batch = batch_of(store, "me", input_file("a"))
    store.close()
    assert folder.stat().st_mode & 0o077 == 0
    again = BatchStore(folder)
    assert again.batch("me", batch.id) == batch
    with pytest.raises(sqlite3.ProgrammingError):
        store.unfinished()
    again.close()
