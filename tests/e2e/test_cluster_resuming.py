"""Streams that go on at another API process of a cluster, without Ray: real engines, a directory in this process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec

from shoal.cluster.directory import Directory
from shoal.cluster.fleet import Fleet
from shoal.cluster.host import EngineHost
from shoal.cluster.ingress import ApiServer
from shoal.cluster.origins import DirectoryPeers
from shoal.cluster.secret import Keys
from shoal.server.settings import Settings, resolve
from shoal.server.setup import make_client
from tests.e2e.test_cluster_engines import SECRET, until

KEYS = ("first-key", "second-key")
HEADERS = {"authorization": f"Bearer {KEYS[0]}"}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"days": {"type": "array", "items": {"enum": ["Mo", "Tu"]}, "minItems": 3, "maxItems": 5}},
        "required": ["days"],
        "additionalProperties": False,
    },
}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 60}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": "the cat", "max_tokens": 80, "logprobs": 2}),
    "choices": (
        "/v1/completions",
        {"prompt": ["the cat", "sat on"], "n": 3, "max_tokens": 40, "stop": ["e"], "echo": True, "seed": 7},
    ),
    "scores": ("/v1/completions", {"prompt": "the cat sat", "max_tokens": 5, "echo": True, "logprobs": 1}),
    "chat": ("/v1/chat/completions", CHAT | {"n": 2, "logprobs": True, "top_logprobs": 2}),
    "usage": ("/v1/completions", {"prompt": "a", "n": 2, "stream_interval": 4, "return_token_ids": True}),
    "tools": (
        "/v1/chat/completions",
        CHAT | {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required", "max_tokens": 300},
    ),
    "schema": (
        "/v1/chat/completions",
        CHAT
        | {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "weather", "schema": WEATHER["parameters"]},
            },
            "max_tokens": 300,
        },
    ),
    "message": ("/v1/messages", CHAT | {"model": "tiny"}),
    "response": ("/v1/responses", {"input": "the cat", "max_output_tokens": 40}),
}


class Api:
    """An API process, and what it tells the others of."""

    def __init__(self, settings: Settings, name: str, directory: Directory) -> None:
        async def ask(method: str, *args: Any) -> Any:
            return await getattr(directory, method)(*args)

        self.peers = DirectoryPeers(name, ask)
        self.server = ApiServer(settings, "127.0.0.1", self.peers)
        self.streams = self.server.service.streams
        self.http = httpx.AsyncClient(base_url=self.server.url, headers=HEADERS, timeout=120)

    async def forget(self, stream_id: str) -> None:
        """Forget a stream, without a word to the others."""
        self.streams.forget(self.streams.find(stream_id, KEYS[0]))

    async def read(self, stream_id: str, after: int) -> bytes:
        """The rest of a stream, but for what says at which time it was made."""
        answer = await self.http.get(f"/v1/streams/{stream_id}", headers={"last-event-id": f"{stream_id}:{after}"})
        assert answer.status_code == 200, answer.text
        return timeless(answer.content)


def timeless(body: bytes) -> bytes:
    return re.sub(rb'"completed_at":\d+', b'"completed_at":0', body)


@asynccontextmanager
async def api_process(folder: Path, data: Path, name: str, directory: Directory, **sections: Any) -> AsyncIterator[Api]:
    """An API process with an engine of its own."""
    settings = resolve(
        {
            "model": str(folder),
            "engine": {"threads": 1},
            "cache": {"num_blocks": 512, "enable_prefix_caching": False},
            "server": {"port": 0, "data_folder": str(data), "api_keys": list(KEYS)},
            **sections,
        }
    )
    api = Api(settings, name, directory)
    make = partial(make_client, settings=settings, metrics=api.server.service.metrics)
    fleet = Fleet(api.server.router, make, Keys.of(SECRET), api.server.service.fingerprint)
    host = EngineHost(
        settings, name, "127.0.0.1", SECRET, lambda endpoint: fleet.update([endpoint] if endpoint else [])
    )
    running = [asyncio.create_task(host.run()), asyncio.create_task(api.server.run())]
    try:
        await until(lambda: any(client.is_connected for client in api.server.router.clients))
        yield api
    finally:
        await api.http.aclose()
        await api.server.stop()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await fleet.close()


def play(folder: Path, data: Path, scene: Callable[[Api, Api, Directory], Coroutine[Any, Any, None]]) -> None:
    """Two API processes whose engines make steps as differently as can be: drafts, and one request at a time."""

    async def both() -> None:
        directory = Directory()
        first = api_process(folder, data, "first", directory, speculation={"method": "suffix"})
        second = api_process(folder, data, "second", directory, scheduler={"max_num_seqs": 1})
        async with first as one, second as other:
            await scene(one, other, directory)

    asyncio.run(both())


def test_a_stream_goes_on_elsewhere_with_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    async def scene(one: Api, other: Api, directory: Directory) -> None:
        for name, (path, body) in ASKED.items():
            asked = await one.http.post(path, json=body | {"stream": True}, headers={"x-stream-resume": "true"})
            assert asked.status_code == 200, (name, asked.text)
            events = timeless(asked.content).split(b"\n\n")
            stream_id = asked.headers["x-request-id"]
            assert len(events) > 5, name
            for after in (0, 1, len(events) // 2, len(events) - 2):
                assert await other.read(stream_id, after) == b"\n\n".join(events[after:]), (name, after)
                await other.forget(stream_id)
            if b"[DONE]" in events[-2]:  # else no number is behind the last event
                done = await other.http.get(
                    f"/v1/streams/{stream_id}", headers={"last-event-id": f"{stream_id}:{len(events) - 1}"}
                )
                assert done.status_code == 204, name
                await other.forget(stream_id)
            beyond = await other.http.get(
                f"/v1/streams/{stream_id}", headers={"last-event-id": f"{stream_id}:{len(events) + 5}"}
            )
            assert beyond.status_code in (204, 400), name

    play(tiny_folder, tmp_path, scene)


def test_who_may_not_have_a_stream_or_comes_too_late_is_told_as_on_one_machine(
    tiny_folder: Path, tmp_path: Path
) -> None:
    async def scene(one: Api, other: Api, directory: Directory) -> None:
        body = {"prompt": "the cat", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        streams = []
        for _ in range(3):
            async with one.http.stream(
                "POST", "/v1/completions", json=body, headers={"x-stream-resume": "true"}
            ) as asked:
                streams.append(f"/v1/streams/{asked.headers['x-request-id']}")
        info = (await other.http.get("/server_info")).json()
        assert info["cluster"] == {"engines": [], "servers": []}  # nobody tells this directory where anything is
        strange = await other.http.get(streams[0], headers={"authorization": f"Bearer {KEYS[1]}"})
        unknown = await other.http.get("/v1/streams/cmpl-0")
        assert strange.status_code == unknown.status_code == 404
        for answer in (strange, unknown):
            assert answer.json()["error"]["message"].endswith("is held: it never was, or nobody read it for 30 s")
        wrong = await other.http.get(streams[0], headers={"last-event-id": "cmpl-0:1"})
        assert wrong.json()["error"]["param"] == "Last-Event-ID"

        assert (await other.http.delete(streams[1])).status_code == 204  # made again by nobody, wherever it is held
        assert (await other.http.get(streams[1])).status_code == 404
        (origin,) = await directory.find_origin(streams[2].rpartition("/")[2])
        await directory.keep_origin("first", msgspec.structs.replace(origin, maker="0.0.1 fp_0"))
        expired = await other.http.get(streams[2])
        assert (expired.status_code, expired.json()["error"]["code"]) == (410, "stream_expired")
        assert "the stream was made by 0.0.1 fp_0, and this server is" in expired.json()["error"]["message"]

        held = streams[0].rpartition("/")[2]
        both = [asyncio.create_task(other.http.get(streams[0])) for _ in range(2)]
        _, last = await asyncio.gather(*both)
        assert last.text.endswith("data: [DONE]\n\n")
        await other.forget(held)
        await one.forget(held)
        await one.peers.tend(one.streams.ids, is_known=False)
        assert (await other.http.get(streams[0])).status_code == 200  # the other one had it, too
        await other.forget(held)
        await other.peers.tend(other.streams.ids, is_known=True)
        assert (await other.http.get(streams[0])).status_code == 404

    play(tiny_folder, tmp_path, scene)
