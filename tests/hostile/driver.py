"""Sends hostile requests to a server, and holds it to the law.

Every answer has a status below 500 (503 only where there are too many connections), and an error is a typed object with
a message of at most 300 characters.  Others are answered as if nothing were: a completion that runs beside is the same
each time, `/health` says 200.  Afterwards no request is left unfinished.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from shoal.server.errors import MAX_MESSAGE_CHARS
from tests.hostile.attacks import KEY, attack

PATIENCE = 280.0  # seconds that an answer may take on a busy machine
MAX_CONNECTIONS_MESSAGE = "as many connections as it may"
NUM_CHOICES = 64 + 1024  # max_num_seqs and max_num_waiting
QUIET = {"prompt": "Z", "max_tokens": 20, "temperature": 0, "ignore_eos": True}


class LawBrokenError(AssertionError):
    """A server did what it may not."""


@dataclass
class Siege:
    """Hostile requests against a server at this port, which is asked for other things meanwhile.

    Attributes:
        statuses: how often each was answered; 0 is no answer, to what was no whole request.
        slowest: the longest that `/health` took, in seconds.
    """

    port: int
    num_at_once: int = 8
    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0

    async def run(self, seeds: range) -> None:
        """Send the attack of each seed.

        Raises:
            LawBrokenError: with the seed of the attack.
        """
        waiting = iter(seeds)
        quiet = await self._answer(completion())
        beside = asyncio.create_task(self._go_on(quiet))
        try:
            await asyncio.gather(*(self._attack_all(waiting) for _ in range(self.num_at_once)))
        finally:
            beside.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beside
        if await self._answer(completion()) != quiet:
            raise LawBrokenError("afterwards the server answers otherwise")
        await self._answer(completion(prompt=["Z"] * NUM_CHOICES, max_tokens=1))  # which need all the room there is

    async def _attack_all(self, seeds: Iterator[int]) -> None:
        for seed in seeds:
            try:
                leaves = random.Random(-seed).random() < 0.1
                said = await self._exchange(attack(seed), leaves=leaves)
                for status, body in answers(said):
                    self.statuses[status] += 1
                    check(status, body)
                self.statuses[0] += not said
            except (AssertionError, ValueError) as error:
                raise LawBrokenError(f"seed {seed}: {error}") from error

    async def _go_on(self, quiet: str) -> None:
        """What somebody else asks meanwhile."""
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            status, _ = next(answers(await self._exchange(head("GET", "/health"))))
            if status != 200:
                raise LawBrokenError(f"/health says {status}")
            self.slowest = max(self.slowest, clock() - began)
            if await self._answer(completion()) != quiet:
                raise LawBrokenError("another client is answered otherwise")
            await asyncio.sleep(0.01)

    async def _answer(self, sent: bytes) -> str:
        """The text of a completion, which is asked for again where the queue was full."""
        status, body = next(answers(await self._exchange(sent)))
        while status == 429:
            await asyncio.sleep(0.1)
            status, body = next(answers(await self._exchange(sent)))
        if status != 200:
            raise LawBrokenError(f"a completion was answered {status}: {body[:1000]!r}")
        text: str = json.loads(body)["choices"][0]["text"]
        return text

    async def _exchange(self, sent: bytes, *, leaves: bool = False) -> bytes:
        """Send, say that nothing more comes, and read until the server closes; or leave after a moment."""
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                with contextlib.suppress(OSError):  # the server may have closed already
                    writer.write(sent)
                    if leaves:
                        await asyncio.sleep(0.01)
                        writer.transport.abort()
                        return b""
                    reading = asyncio.create_task(reader.read())
                    await writer.drain()
                    writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    return await reading
                return b""
            finally:
                writer.transport.abort()


def head(method: str, path: str, length: int = 0) -> bytes:
    fields = f"host: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\ncontent-length: {length}"
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\nconnection: close\r\n\r\n".encode()


def completion(**others: Any) -> bytes:
    body = json.dumps(QUIET | others).encode()
    return head("POST", "/v1/completions", len(body)) + body


def answers(said: bytes) -> Iterator[tuple[int, bytes]]:
    """Status and body of each answer of a connection; the last one may have been cut."""
    while said:
        first, separator, said = said.partition(b"\r\n\r\n")
        lines = first.split(b"\r\n")
        if not separator or not lines[0].startswith(b"HTTP/1.1 "):
            raise ValueError(f"no HTTP: {first[:200]!r}")
        status = int(lines[0].split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        if status < 200:
            continue
        if headers.get(b"transfer-encoding") == b"chunked":
            body, said = unchunked(said)
        else:
            is_to_head = said.startswith(b"HTTP/1.1 ")  # it has a length, and no body
            length = 0 if is_to_head else int(headers.get(b"content-length", 0))
            body, said = said[:length], said[length:]
            if said and not said.startswith(b"HTTP/1.1 "):
                raise ValueError("more bytes than the answer has")
        yield status, body


def unchunked(said: bytes) -> tuple[bytes, bytes]:
    """A chunked body, and what follows it."""
    body = b""
    while said:
        size, _, said = said.partition(b"\r\n")
        length = int(size, 16)
        body, said = body + said[:length], said[length + 2 :]
        if length == 0:
            break
    return body, said


def check(status: int, body: bytes) -> None:
    """Hold an answer to the law."""
    assert status < 500 or (status == 503 and MAX_CONNECTIONS_MESSAGE.encode() in body), f"{status}: {body[:1000]!r}"
    if status >= 400 and body:  # the answer to HEAD has none
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, error
        assert 0 < len(error["message"]) <= MAX_MESSAGE_CHARS, error
        assert error["type"] and error["code"], error
    assert b'"type":"server_error"' not in body, f"an event of an error: {body[-1000:]!r}"
