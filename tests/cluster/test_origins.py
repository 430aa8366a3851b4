"""What the directory keeps of streams: for as long as their API processes are heard of, and a while after."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shoal.cluster.origins as origins_module
from shoal.cluster.directory import Directory
from shoal.cluster.origins import DirectoryPeers, Origins
from shoal.server.errors import EngineUnavailableError
from shoal.server.peers import Identity, Origin
from shoal.server.wire.responses import ClusterServer

KEEP_SECONDS = 30.0


def origin_of(stream_id: str, num_bytes: int = 10) -> Origin:
    return Origin(Identity(stream_id, 1, 2), "m", "", "/v1/completions", {}, b"x" * num_bytes, KEEP_SECONDS)


def server_of(replica: str) -> ClusterServer:
    return ClusterServer(replica, "a node", f"http://{replica}")


def test_a_stream_is_known_while_its_api_process_is_heard_of_and_a_while_after() -> None:
    async def scene() -> None:
        now = [0.0]
        directory = Directory(lambda: now[0])
        for replica in "ab":
            await directory.tell_server(server_of(replica))
            await directory.keep_origin(replica, origin_of(f"of {replica}"))
        for _ in range(100):  # only the first goes on
            now[0] += 1
            assert await directory.tell_server(server_of("a"))
            assert (await directory.find_origin("of b") == []) == (now[0] > KEEP_SECONDS)
        await directory.keep_origin("b", origin_of("another of b"))  # so that it is heard of again
        await directory.tell_server(server_of("a"))
        assert await directory.find_origin("another of b") == [origin_of("another of b")]
        assert await directory.find_origin("of a") == [origin_of("of a")]

    asyncio.run(scene())


def test_a_stream_that_was_made_again_belongs_to_whoever_made_it() -> None:
    origins = Origins()
    origins.put("a", origin_of("x"))
    origins.put("b", origin_of("x"))
    origins.drop(["x"], "a")
    assert origins.find("x") is not None
    origins.drop(["x"], "b")
    assert origins.find("x") is None
    assert origins.all == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5000))))
def test_the_newest_are_kept_in_so_many_bytes(puts: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(origins_module, "MAX_BYTES", 10_000)
        origins, expected = Origins(), list[Origin]()
        for number, num_bytes in puts:
            origin = origin_of(str(number), num_bytes)
            origins.put("a", origin)
            expected = [one for one in expected if one.identity.id != str(number)] + [origin]
            while sum(one.size for one in expected) > 10_000:
                del expected[0]
            assert origins.all == expected


def test_what_the_directory_did_not_take_it_is_told_again() -> None:
    async def scene() -> None:
        directory, is_there = Directory(), [False]

        async def ask(method: str, *args: Any) -> Any:
            return await getattr(directory, method)(*args) if is_there[0] else None

        teller = DirectoryPeers("a", ask)
        await teller.note(origin_of("x"))
        is_there[0] = True
        await teller.tend({"x"}, is_known=True)
        assert await teller.find("x") == origin_of("x")

    asyncio.run(scene())


def test_a_directory_that_is_new_is_told_again() -> None:
    async def scene() -> None:
        directories = [Directory()]

        async def ask(method: str, *args: Any) -> Any:
            return await getattr(directories[-1], method)(*args)

        teller = DirectoryPeers("a", ask)
        for name in "xy":
            await teller.note(origin_of(name))
        directories.append(Directory())
        assert await teller.find("x") is None
        await teller.tend({"x"}, is_known=await ask("tell_server", server_of("a")))
        assert [await teller.find(name) for name in "xy"] == [origin_of("x"), None]
        await teller.forget("x")
        assert await teller.find("x") is None

        async def silence(method: str, *args: Any) -> None:
            """A directory that does not answer."""

        with pytest.raises(EngineUnavailableError, match="the cluster's directory does not answer"):
            await DirectoryPeers("b", silence).find("x")

    asyncio.run(scene())
