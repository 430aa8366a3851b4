"""Ranks join an engine, are refused, and end; whatever is wrong is named at once."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

import shoal.server.engine.rank as rank_module
from shoal.model.backends.split import Split
from shoal.scheduler.errors import ConfigError
from shoal.server.engine.build import build_engine
from shoal.server.engine.rank import join
from shoal.server.engine.rank_secret import read_secret
from shoal.server.engine.rank_wire import Challenge, Hello, Loaded, Proof, RankSocket, Refused, Welcome
from shoal.server.engine.ranks import Crew
from shoal.server.settings import resolve
from tests.e2e.checkpoints import random_checkpoint

SECRET = "a secret of the test"
ANOTHER = Hello("0.0.0", "abacus", "0123")
WELCOME = Welcome(1, (2, 1, 1), 1, "float32", 8, 16, 64, keeps_all=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def address() -> str:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def crew_at(checkpoint: Path) -> Iterator[Callable[..., Crew]]:
    crews = []

    def make(
        address: str, num_ranks: int = 2, seconds: float = 30, lost: Any = print, secret_file: Path | None = None
    ) -> Crew:
        engine = {
            "tensor_parallel": num_ranks,
            "parallel_address": address,
            "parallel_wait_seconds": seconds,
            "parallel_secret_file": secret_file,
        }
        crews.append(Crew(resolve({"model": str(checkpoint), "engine": engine}), Split(tensor=num_ranks), lost))
        return crews[-1]

    yield make
    for crew in crews:
        crew.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def test_a_rank_joins_and_its_end_is_told_at_once(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    told, is_told = [], threading.Event()
    crew = crew_at(address, lost=lambda words: (told.append(words), is_told.set()))
    gathering = pool.submit(crew.gather)
    joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
    gathering.result(30)
    crew.welcome(WELCOME)
    rank, welcome = joining.result(30)
    assert welcome == WELCOME
    rank.send(Loaded())
    crew.wait_loaded()
    rank.close()
    assert is_told.wait(30)
    assert told == [f"rank 1 at {crew.members[0].peer} has ended"]


def test_a_crew_that_is_closed_tells_nothing(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    told: list[str] = []
    crew = crew_at(address, lost=told.append)
    gathering = pool.submit(crew.gather)
    joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
    gathering.result(30)
    crew.welcome(WELCOME)
    rank, _ = joining.result(30)
    rank.send(Loaded())
    crew.wait_loaded()
    crew.close()
    assert rank.receive() is None
    assert told == []
    assert not [thread for thread in threading.enumerate() if thread.name == "shoal-ranks"]
    rank.close()


def test_strangers_are_sent_away(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    crew = crew_at(address)
    gathering = pool.submit(crew.gather)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x03\x00\x00\x00abc"):
        with closing(connected(address)) as stranger:
            stranger.sendall(words)
            with suppress(ConnectionError):
                while stranger.recv(1024):  # until it is sent away
                    pass
    joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
    gathering.result(30)
    crew.close()
    with pytest.raises(ConfigError, match="ended the connection"):
        joining.result(30)


@pytest.mark.parametrize(
    ("its", "own"), [("a secret of another", SECRET), ("", SECRET), (SECRET, "")], ids=["other", "none", "needless"]
)
def test_a_rank_without_the_secret_is_sent_away_and_both_say_so(
    its: str,
    own: str,
    *,
    address: str,
    checkpoint: Path,
    crew_at: Callable[..., Crew],
    pool: ThreadPoolExecutor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The engine goes on waiting for one that has it."""
    file = tmp_path / "secret"
    file.write_text(own + "\n")
    crew = crew_at(address, secret_file=file if own else None)
    gathering = pool.submit(crew.gather)
    hello = Hello.of(checkpoint, "cpu")
    with pytest.raises(ConfigError, match="does not know the secret of this model's ranks"):
        join(address, hello, 30, its.encode())
    joining = pool.submit(join, address, hello, 30, own.encode())
    gathering.result(30)
    assert "does not know the secret of this model's ranks (parallel_secret_file), and is sent away" in caplog.text
    crew.welcome(WELCOME)
    rank, _ = joining.result(30)
    rank.close()


def test_a_proof_that_was_heard_proves_nothing(
    address: str, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Who sends back what the engine says has its own challenge answered, and no more."""
    file = tmp_path / "secret"
    file.write_text(SECRET)
    gathering = pool.submit(crew_at(address, seconds=2, secret_file=file).gather)
    mirror = RankSocket(connected(address))
    with closing(mirror):
        for kind in (Challenge, Proof):
            heard = mirror.receive()
            assert isinstance(heard, kind)
            mirror.send(heard)
        assert mirror.receive() is None
    with pytest.raises(ConfigError, match="0 of 1 ranks joined"):
        gathering.result(30)


def test_secrets_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("short\n")
    for wrong, message in ((file, "at least 16 characters"), (tmp_path / "nowhere", "No such file")):
        with pytest.raises(ConfigError, match=message) as caught:
            read_secret(wrong)
        assert caught.value.param == "parallel_secret_file"
    file.write_text(SECRET + "\n")
    assert read_secret(file) == SECRET.encode()


@pytest.mark.parametrize("field", Hello.__struct_fields__)
def test_a_rank_that_differs_is_named_on_both_sides(
    field: str, address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    own = Hello.of(checkpoint, "cpu")
    other = Hello(**{name: getattr(ANOTHER if name == field else own, name) for name in Hello.__struct_fields__})
    gathering = pool.submit(crew_at(address).gather)
    words = f"does not fit: its {field} is {getattr(other, field)}, that of the engine {getattr(own, field)}"
    with pytest.raises(ConfigError, match=re.escape(words)):
        join(address, other, 30)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        gathering.result(30)
    assert caught.value.param == "parallel_address"


def test_fewer_ranks_than_asked(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
    with pytest.raises(ConfigError, match=f"1 of 2 ranks joined at {address} within 1 s"):
        crew_at(address, num_ranks=3, seconds=1).gather()
    with pytest.raises(ConfigError, match="1 of 2 ranks joined"):
        joining.result(30)


def test_a_rank_that_cannot_load(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    for last_words, named in ((Refused("no memory"), "no memory"), (None, "it has ended")):
        crew = crew_at(address)
        joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
        crew.gather()
        crew.welcome(WELCOME)
        rank, _ = joining.result(30)
        if last_words:
            rank.send(last_words)
        rank.close()
        with pytest.raises(ConfigError, match=f"rank 1 at .* cannot load its part: {named}"):
            crew.wait_loaded()
        crew.close()


def test_addresses_that_cannot_be(address: str, crew_at: Callable[..., Crew]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        for wrong in (f"127.0.0.1:{taken.getsockname()[1]}", "127.0.0.1:99999", "192.0.2.1:7000"):
            with pytest.raises(ConfigError, match=f"parallel_address {wrong}: cannot listen there"):
                crew_at(wrong).gather()
    for wrong in (address, "127.0.0.1:99999", "127.0.0.1:x"):
        with pytest.raises(ConfigError, match=f"no engine at {wrong}: "):
            join(wrong, ANOTHER, 0)


def test_what_listens_may_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "ANSWER_SECONDS", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = "{}:{}".format(*server.getsockname())
        with pytest.raises(ConfigError, match=f"what listens at {address} timed out"):
            join(address, ANOTHER, 30)


def test_what_listens_may_be_no_engine(pool: ThreadPoolExecutor) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        joining = pool.submit(join, f"127.0.0.1:{server.getsockname()[1]}", ANOTHER, 30)
        connection, _ = server.accept()
        with closing(connection):
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        with pytest.raises(ConfigError, match="is none of Shoal's engines and ranks"):
            joining.result(30)


def test_settings_that_contradict_each_other(checkpoint: Path) -> None:
    for settings, words in (
        ({"backend": "native", "tensor_parallel": 2}, "tensor_parallel 2 is not for the native backend"),
        ({"backend": "torch", "tensor_parallel": 3}, "tensor_parallel 3: it does not divide"),
        ({"backend": "torch", "pipeline_parallel": 2, "standby": True, "parallel_address": "a:1"}, "standby and"),
        ({"backend": "torch", "pipeline_parallel": 2, "engines": 2, "parallel_address": "a:1"}, "engines and"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_engine(resolve({"model": str(checkpoint), "engine": settings, "cache": {"num_blocks": 64}}))


def connected(address: str) -> socket.socket:
    """A connection to what will listen there."""
    host, _, port = address.partition(":")
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)))
