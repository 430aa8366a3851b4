"""Commands that wait for an engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from shoal.scheduler.output import SamplingParams
from shoal.server.engine.messages import Abort, EngineRequest, Submit
from shoal.server.engine.outbox import MAX_SIZE, Outbox


def submit(*names: str, num_tokens: int = 1) -> Submit:
    params = SamplingParams(max_tokens=1, seed=0)
    return Submit([EngineRequest(name, [0] * num_tokens, params) for name in names])


async def taken(outbox: Outbox) -> list[Sequence[str]]:
    """All messages that it has: ids, behind an abort's mark."""
    found: list[Sequence[str]] = []
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0):
                command = await outbox.get()
            if isinstance(command, Submit):
                found.append([request.request_id for request in command.requests])
            elif isinstance(command, Abort):
                found.append(["abort", *command.request_ids])
    return found


def test_what_waits_goes_in_one_message_and_aborts_go_first() -> None:
    async def scene() -> None:
        outbox = Outbox()
        outbox.put(submit("a", "b"))
        assert await taken(outbox) == [["a", "b"]]
        for command in (submit("c"), Abort(["a"]), submit("d"), Abort(["b"])):
            outbox.put(command)
        assert await taken(outbox) == [["abort", "a", "b"], ["c", "d"]]
        assert await taken(outbox) == []

    asyncio.run(scene())


def test_what_is_aborted_before_it_was_sent_is_not_sent() -> None:
    async def scene() -> None:
        outbox = Outbox()
        for _ in range(1000):
            outbox.put(submit("a", "b"))
            outbox.put(Abort(["a", "b"]))
        outbox.put(submit("c"))
        assert await taken(outbox) == [["c"]]
        outbox.put(Abort(["c"]))
        outbox.put(submit("c"))  # another trial
        assert await taken(outbox) == [["abort", "c"], ["c"]]

    asyncio.run(scene())


def test_a_message_is_no_longer_than_is_encoded_in_a_moment() -> None:
    async def scene() -> None:
        outbox = Outbox()
        outbox.put(submit("a", "b", "c", num_tokens=MAX_SIZE - 1))
        outbox.put(submit("d"))
        assert await taken(outbox) == [["a", "b"], ["c", "d"]]

    asyncio.run(scene())
