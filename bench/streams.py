"""A client that takes little of the machine it measures: what comes is kept with its time, and read at the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

from shoal.loadtest.records import RequestRecord
from shoal.loadtest.stream import CALL, read_events


def stream_all(urls: Sequence[str], prompts: list[list[int]], max_tokens: int) -> tuple[float, float]:
    """Return the seconds of concurrent streams of `max_tokens` tokens, one for each prompt, and the median TTFT.

    Several servers share the prompts out.
    """
    fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [json.dumps({"prompt": p, **fields, "stream_options": {"include_usage": True}}).encode() for p in prompts]
    began, streams = uvloop.run(_stream(urls, bodies))
    records = [RequestRecord(request_id=str(number), sent_at=began) for number in range(len(streams))]
    for record, stream in zip(records, streams, strict=True):
        read_events(record, list(stream.events()))
        assert record.error is None, record.error
        assert record.num_output_tokens == max_tokens, f"expected {max_tokens} tokens, got {record.num_output_tokens}"
    seconds = max(record.token_times[-1] for record in records) - began
    return seconds, median(record.token_times[0] - began for record in records)


async def _stream(urls: Sequence[str], bodies: list[bytes]) -> tuple[float, list[_Stream]]:
    connecting = []
    began = time.perf_counter()
    for url, body in zip(cycle(urls), bodies, strict=False):
        address = urlsplit(url)
        head = f"POST {CALL.path} HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        protocol = partial(_Stream, head.encode() + body)
        loop = asyncio.get_running_loop()
        connecting.append(loop.create_connection(protocol, address.hostname or "", address.port or 80))
    streams = [stream for _, stream in await asyncio.gather(*connecting)]
    await asyncio.gather(*(stream.ended for stream in streams))
    return began, streams


class _Stream(asyncio.Protocol):
    """One connection, with one request."""

    def __init__(self, request: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._received: list[tuple[float, bytes]] = []

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)

    def events(self) -> Iterator[tuple[float, bytes]]:
        """When each event came, and its data."""
        parts: list[bytes] = []

        class Body:
            def on_body(self, body: bytes) -> None:
                parts.append(body)

        parser = httptools.HttpResponseParser(Body())
        rest = b""
        for came_at, data in self._received:
            parser.feed_data(data)
            *lines, rest = (rest + b"".join(parts)).split(b"\n")
            parts.clear()
            for line in lines:
                if line.startswith(b"data:"):
                    yield came_at, line[5:].strip()
