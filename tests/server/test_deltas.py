"""When what is new reaches a stream: at once where that can be, together where the client is behind, never lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats
from shoal.server.deltas import Deltas
from shoal.server.engine.client import EngineClient
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest, News, Ready
from shoal.server.generation import Generation
from shoal.server.settings import resolve
from shoal.server.setup import build_service
from shoal.server.sinks import BodyWriter
from shoal.server.terms import Terms
from shoal.server.text import Choice, Delta
from shoal.server.wire.parsing import parse_body
from shoal.server.wire.requests import CompletionBody
from tests.e2e.checkpoints import cycle_checkpoint
from tests.examples import examples
from tests.server.test_generation import TOKENIZER

STOP = TOKENIZER.decode([70, 71])
STATS = SchedulerStats(0, 0, 0.0, 0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cycle_checkpoint(tmp_path_factory.mktemp("checkpoints") / "cycle")


class Slow:
    """A sink whose client reads only when it is told to."""

    def __init__(self, *, is_ready: bool, coalesces: bool = True) -> None:
        self.is_ready = is_ready
        self.coalesces = coalesces
        self.reads = asyncio.Event()
        self.given: list[list[int]] = []

    def give(self, deltas: list[Delta]) -> None:
        self.given += [delta.token_ids for delta in deltas]

    async def flush(self) -> None:
        if not self.is_ready:
            await self.reads.wait()


async def play(
    folder: Path, sink: Slow, scene: Callable[[Callable[..., None], EngineClient], Awaitable[None]], **fields: Any
) -> None:
    """Have one call run into a sink; the scene says what the engine says."""
    service, client = build_service(resolve({"model": str(folder)}))
    client.connect(Ready(SchedulerConfig(num_blocks=64, max_model_len=512), 1, 2, "by hand", None), lambda _: None)
    body = parse_body(CompletionBody, msgspec.json.encode({"prompt": "Z", "stream": True} | fields))
    call = Generation(service, body, [("Z", [5])], "", api_id="a", seed=1, terms=Terms())

    def say(*token_ids: int, ends: bool = False) -> None:
        reason = FinishReason.LENGTH if ends else None
        client.take(News([RequestOutput("a-0-0", list(token_ids), reason)], STATS))

    running = asyncio.create_task(call.run(sink.give, sink))
    await asyncio.sleep(0)
    await scene(say, client)
    sink.reads.set()
    await running
    assert client.num_unfinished == 0


def test_tokens_are_given_from_where_the_news_arrives(folder: Path) -> None:
    async def main() -> None:
        sink = Slow(is_ready=True)

        async def scene(say: Callable[..., None], _: EngineClient) -> None:
            for token_id in (70, 71, 72):
                say(token_id)
                await asyncio.sleep(0)
                assert sink.given[-1] == [token_id]
            say(73, ends=True)

        await play(folder, sink, scene)
        assert sink.given == [[70], [71], [72], [73]]

    asyncio.run(main())


@pytest.mark.parametrize("coalesces", [True, False])
def test_a_client_that_is_behind_gets_its_tokens_together(folder: Path, coalesces: bool) -> None:
    async def main() -> None:
        sink = Slow(is_ready=False, coalesces=coalesces)

        async def scene(say: Callable[..., None], _: EngineClient) -> None:
            say(70)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert sink.given == [[70]]
            for token_id in (71, 72, 73):
                say(token_id)
                await asyncio.sleep(0)
            assert sink.given == [[70]]
            sink.reads.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            say(74, ends=True)

        await play(folder, sink, scene)
        assert sink.given == ([[70], [71, 72, 73], [74]] if coalesces else [[70], [71], [72], [73], [74]])

    asyncio.run(main())


def test_what_fails_in_a_sink_ends_the_call(folder: Path) -> None:
    async def main() -> None:
        sink = Slow(is_ready=True)

        def give(_: list[Delta]) -> None:
            raise ValueError("a fault of ours")

        sink.give = give  # type: ignore[method-assign]

        async def scene(say: Callable[..., None], client: EngineClient) -> None:
            say(70)
            assert client.num_unfinished == 1

        with pytest.raises(ValueError, match="a fault of ours"):
            await play(folder, sink, scene)

    asyncio.run(main())


@settings(max_examples=examples(200))
@given(
    cuts=st.lists(st.lists(st.integers(65, 90), min_size=1, max_size=3), min_size=1, max_size=12),
    portions=st.lists(st.integers(1, 4), min_size=12, max_size=12),
    interval=st.integers(1, 6),
    coalesces=st.booleans(),
)
def test_no_token_is_lost_or_early(cuts: list[list[int]], portions: list[int], interval: int, coalesces: bool) -> None:
    """However outputs come together: the first token alone counts at once, and then as many as the interval says."""
    journal = Journal(EngineRequest("a", TOKENIZER.encode("p"), SamplingParams(max_tokens=99, seed=0)), "0", 0.0)
    outputs = [RequestOutput("a", token_ids) for token_ids in cuts]
    outputs[-1].finish_reason = FinishReason.LENGTH
    come: list[RequestOutput] = []
    deltas = Deltas({"a": Choice(0, journal, TOKENIZER, [], None, interval=interval)}, lambda: come)
    taken: list[Delta] = []
    while outputs:
        num = portions[len(taken) % 12]
        come, outputs = outputs[:num], outputs[num:]
        for output in come:
            journal.note(output, 0.0)
        taken += deltas.take(coalesces=coalesces)
    assert [token_id for delta in taken for token_id in delta.token_ids] == journal.output_token_ids
    assert "".join(delta.text for delta in taken) == TOKENIZER.decode(journal.output_token_ids)
    assert taken[-1].finish_reason == "length" and deltas.are_finished and not deltas.has_rest
    assert all(len(delta.token_ids) >= interval for delta in taken[1:-1])
    if not coalesces and interval == 1:
        assert [delta.token_ids for delta in taken] == cuts
    assert taken[0].token_ids[: len(cuts[0])] == cuts[0]


@settings(max_examples=examples(200))
@given(data=st.data(), texts=st.lists(st.lists(st.integers(65, 90), min_size=1, max_size=9), min_size=1, max_size=3))
def test_in_order_deltas_depend_on_tokens_alone(data: st.DataObject, texts: list[list[int]]) -> None:
    """However tokens are cut and whichever choice is ahead; a stop string ends a choice before its tokens do."""

    def played() -> list[Delta]:
        rest = {str(index): list(token_ids) for index, token_ids in enumerate(texts)}
        params = SamplingParams(max_tokens=99, seed=0)
        journals = {name: Journal(EngineRequest(name, [1], params), "0", 0.0) for name in rest}
        come: list[RequestOutput] = []
        choices = {name: Choice(int(name), journals[name], TOKENIZER, [STOP], None) for name in rest}
        deltas, taken = Deltas(choices, lambda: come), list[Delta]()
        deltas.keep_order()
        while rest:
            name = data.draw(st.sampled_from(list(rest)))
            count = data.draw(st.integers(1, len(rest[name])))
            output = RequestOutput(name, rest[name][:count])
            rest[name] = rest[name][count:]
            if not rest[name]:
                output.finish_reason = FinishReason.LENGTH
                del rest[name]
            journals[name].note(output, 0.0)
            come = [RequestOutput(name, [], prompt_logprobs=[]), output]
            taken += deltas.take(coalesces=False)
            come = []
            while deltas.has_rest:
                portion = deltas.take(coalesces=False)
                assert len(portion) <= 1
                taken += portion
        assert deltas.are_finished
        return taken

    first = played()
    assert first == played()
    by_index = [
        [token_id for delta in first if delta.index == index for token_id in delta.token_ids] for index in (0, 1, 2)
    ]
    for token_ids, given_ids in zip(texts, by_index, strict=False):
        assert given_ids == token_ids[: len(given_ids)]
        assert len(given_ids) == len(token_ids) or STOP in TOKENIZER.decode(given_ids)


def test_a_part_of_a_body_is_a_chunk_until_the_client_has_gone() -> None:
    written: list[bytes] = []
    cycle: Any = SimpleNamespace(disconnected=False, flow=SimpleNamespace(write_paused=False))
    writer = BodyWriter(cycle, cast(Any, SimpleNamespace(write=written.append)))
    writer.write(b"x" * 17)
    assert writer.is_ready and written == [b"11\r\n" + b"x" * 17 + b"\r\n"]
    cycle.disconnected = cycle.flow.write_paused = True
    writer.write(b"y")
    assert not writer.is_ready and len(written) == 1
