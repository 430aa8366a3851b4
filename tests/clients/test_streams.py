"""Streamed answers: whole, cut into any pieces, broken, and left alone."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.clients import (
    AsyncShoalClient,
    BrokenConnectionError,
    Chunk,
    ProtocolError,
    ShoalClient,
    StreamError,
    TimedOutError,
    Usage,
)
from tests.clients.conftest import Driver
from tests.clients.fake_server import (
    PATIENCE,
    Answer,
    FakeServer,
    Recorded,
    chat_chunks,
    completion_chunks,
    error_body,
    sse,
)

HELLO: Any = [{"role": "user", "content": "hello"}]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_a_streamed_completion(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.stream(*completion_chunks("The ", "größte ", "🐟", seed=3))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as official:
        theirs = list(
            official.completions.create(model="shoal", prompt="x", stream=True, stream_options={"include_usage": True})
        )
    ours = driver.stream("stream_complete", "x", model="shoal")

    assert [chunk.text for chunk in ours] == ["".join(choice.text for choice in chunk.choices) for chunk in theirs]
    assert text_of(ours) == "The größte 🐟"
    assert [d.finish_reason for chunk in ours for d in chunk.choices] == [None, None, None, "stop"]
    assert [chunk.usage for chunk in ours] == [None, None, None, None, Usage(5, 2, 4, 1, 3)]
    assert {chunk.seed for chunk in ours} == {3}
    assert server.requests[0].body == server.requests[1].body


def test_a_streamed_chat_answer(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.stream(*chat_chunks("Hel", "lo"))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret") as official:
        theirs = list(
            official.chat.completions.create(
                messages=HELLO, model="shoal", stream=True, stream_options={"include_usage": True}
            )
        )
    ours = driver.stream("stream_chat", HELLO, model="shoal")

    assert [chunk.text for chunk in ours] == [
        "".join(choice.delta.content or "" for choice in chunk.choices) for chunk in theirs
    ]
    assert text_of(ours) == "Hello"
    assert ours[-1].usage == Usage(5, 2, 4, 1, 3)
    assert server.requests[0].body == server.requests[1].body


def test_several_choices_are_told_apart_by_index(server: FakeServer, driver: Driver) -> None:
    first, second, *_ = completion_chunks("a", "b")
    second["choices"][0]["index"] = 1
    server.stream(first, second)
    chunks = driver.stream("stream_complete", "x", n=2)
    assert [(d.index, d.text) for chunk in chunks for d in chunk.choices] == [(0, "a"), (1, "b")]


@given(cuts=st.lists(st.integers(1, 2000), max_size=12), line_end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
@settings(max_examples=40)
def test_the_network_may_cut_the_bytes_anywhere(shared_server: FakeServer, cuts: list[int], line_end: bytes) -> None:
    # U+2028 and U+0085 end a line elsewhere, but neither in JSON nor in an event stream.
    texts = ["größer", "🐟🐠", "a\u2028b\x85c", "\n\r\n", 'data: "[DONE]"']
    whole = b": a comment\n\n" + b"".join(map(sse, completion_chunks(*texts))) + b"data: [DONE]\n\n"
    whole = whole.replace(b"\n", line_end)
    borders = [0, *sorted({cut % len(whole) for cut in cuts} - {0}), len(whole)]
    pieces = [whole[i:j] for i, j in pairwise(borders)]
    shared_server.answer(Answer(content_type="text/event-stream", pieces=pieces))
    with ShoalClient(shared_server.url) as client:
        assert text_of(list(client.stream_complete("x"))) == "".join(texts)


@pytest.fixture(scope="module")
def shared_server() -> Any:
    server = FakeServer()
    yield server
    server.close()


def test_an_event_in_bytes_of_one(server: FakeServer, driver: Driver) -> None:
    whole = b"".join(map(sse, chat_chunks("né", "🐟"))) + b"data: [DONE]\n\n"
    server.answer(Answer(content_type="text/event-stream", pieces=[bytes([byte]) for byte in whole]))
    assert text_of(driver.stream("stream_chat", HELLO)) == "né🐟"


def test_an_error_event_raises_after_what_came_before(server: FakeServer, driver: Driver) -> None:
    first, *_ = completion_chunks("partial")
    server.stream(first, error_body("the engine failed", type="server_error", code="engine_error"))
    came: list[Chunk] = []
    with pytest.raises(StreamError, match=r"^the engine failed$") as caught:
        driver.stream("stream_complete", "x", into=came)
    assert (caught.value.type, caught.value.param, caught.value.code) == ("server_error", None, "engine_error")
    assert text_of(came) == "partial"


@pytest.mark.parametrize("ending", ["end", "cut"])
def test_a_stream_that_ends_without_done_raises(server: FakeServer, driver: Driver, ending: str) -> None:
    server.stream(*completion_chunks("partial"), done=False, ending=ending)
    came: list[Chunk] = []
    with pytest.raises(BrokenConnectionError):
        driver.stream("stream_complete", "x", into=came)
    assert text_of(came) == "partial"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "data",
    ["{not json", "[]", "7", '{"choices": 5}', '{"choices": [{}]}', json.dumps({"id": "cmpl-1", "choices": []})],
)
def test_an_event_that_is_not_a_chunk_raises(server: FakeServer, driver: Driver, data: str) -> None:
    server.answer(Answer(content_type="text/event-stream", pieces=[f"data: {data}\n\n".encode()]))
    with pytest.raises(ProtocolError, match="/v1/completions") as caught:
        driver.stream("stream_complete", "x")
    assert data in caught.value.message


def test_a_page_in_place_of_a_stream_raises(server: FakeServer, driver: Driver) -> None:
    server.answer(Answer(content_type="text/html", pieces=[b"<h1>Welcome to the proxy</h1>"]))
    with pytest.raises(ProtocolError, match="text/html"):
        driver.stream("stream_complete", "x")


def test_silence_between_tokens_times_out(server: FakeServer, driver: Driver) -> None:
    first, *_ = completion_chunks("partial")
    server.stream(first, done=False, ending="silence")
    came: list[Chunk] = []
    with pytest.raises(TimedOutError, match="read_timeout"):
        driver.stream("stream_complete", "x", settings={"read_timeout": 0.5}, into=came)
    assert text_of(came) == "partial"
    assert server.disconnected.wait(PATIENCE)


def test_leaving_the_with_block_disconnects(server: FakeServer) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence")
    with ShoalClient(server.url) as client:
        with client.stream_complete("x") as stream:
            assert next(stream).text == "partial"
        assert server.disconnected.wait(PATIENCE)
        assert list(stream) == []


def test_leaving_the_async_with_block_disconnects(server: FakeServer) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence")

    async def run() -> None:
        async with AsyncShoalClient(server.url) as client:
            async with client.stream_complete("x") as stream:
                assert (await anext(stream)).text == "partial"
            assert server.disconnected.wait(PATIENCE)  # the event loop stands still: nothing is left for it to close
            assert [chunk async for chunk in stream] == []

    asyncio.run(run())


def test_a_dropped_stream_disconnects(server: FakeServer) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence")
    with ShoalClient(server.url) as client:
        for _ in client.stream_complete("x"):
            break
        gc.collect()
        assert server.disconnected.wait(PATIENCE)


def test_a_dropped_async_stream_disconnects(server: FakeServer) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence")

    async def run() -> bool:
        async with AsyncShoalClient(server.url) as client:
            async for _ in client.stream_complete("x"):
                break
            gc.collect()
            return await asyncio.to_thread(server.disconnected.wait, PATIENCE)

    assert asyncio.run(run())


def test_a_cancelled_task_disconnects(server: FakeServer) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence")

    async def run() -> None:
        async with AsyncShoalClient(server.url) as client:
            started = asyncio.Event()

            async def consume() -> None:
                async for _ in client.stream_complete("x"):
                    started.set()

            task = asyncio.create_task(consume())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.disconnected.wait, PATIENCE)

    asyncio.run(run())


def test_a_stream_that_was_never_begun_sends_nothing(server: FakeServer, driver: Driver) -> None:
    with ShoalClient(server.url) as client, client.stream_complete("x"):
        pass
    assert server.requests == []


def test_a_finished_stream_leaves_its_connection_to_the_next(server: FakeServer) -> None:
    for _ in range(3):
        server.stream(*completion_chunks("x"))
    with ShoalClient(server.url) as client:
        for _ in range(3):
            list(client.stream_complete("x"))
    assert len({seen.client for seen in server.requests}) == 1


def test_many_streams_at_once_do_not_wait_for_each_other(server: FakeServer) -> None:
    """More streams than httpx has connections by default: all must reach the server while none has ended."""
    num_streams = 120
    for _ in range(num_streams):
        server.stream(completion_chunks("x")[0], done=False, ending="silence")

    async def run() -> list[Recorded]:
        async with AsyncShoalClient(server.url, connect_timeout=PATIENCE) as client:
            streams = [client.stream_complete("x") for _ in range(num_streams)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            for stream in streams:
                await stream.close()
        return server.requests

    assert len(asyncio.run(run())) == num_streams


# -- streams that go on ------------------------------------------------------------------------------------------------


@pytest.fixture
def _without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)


def sent(server: FakeServer) -> list[tuple[str, str, str | None]]:
    """Method, path and last event of each request."""
    return [(seen.method, seen.path, seen.headers.get("last-event-id")) for seen in server.requests]


@pytest.mark.usefixtures("_without_delay")
def test_a_stream_that_breaks_goes_on_after_the_last_event(server: FakeServer, driver: Driver) -> None:
    chunks = completion_chunks(*"abcdef")
    half = sse(chunks[4])[:20]
    server.stream(*chunks[:2], done=False, ending="cut", first=1)
    server.stream(done=False, ending="cut")
    server.stream(chunks[2], done=False, first=3)
    server.stream(chunks[3], done=False, ending="silence", first=4)
    server.answer(Answer(content_type="text/event-stream", pieces=[b"id: cmpl-1:5\n" + half], ending="cut"))
    server.stream(*chunks[4:], first=5)
    came = driver.stream("stream_complete", "x", settings={"read_timeout": 0.5})
    assert text_of(came) == "abcdef" and came[-1].usage == Usage(5, 2, 4, 1, 3)
    path = "/v1/streams/cmpl-1"
    assert sent(server) == [
        ("POST", "/v1/completions", None),
        *(("GET", path, f"cmpl-1:{number}") for number in (2, 2, 3, 4, 4)),
    ]
    assert server.requests[0].headers["x-stream-resume"] == "true"


@pytest.mark.usefixtures("_without_delay")
def test_a_stream_that_breaks_before_its_first_event_goes_on_if_it_is_held(server: FakeServer, driver: Driver) -> None:
    server.stream(done=False, ending="cut", x_request_id="cmpl-1", x_stream_resume="true")
    server.stream(*completion_chunks("a"), first=1)
    assert text_of(driver.stream("stream_complete", "x")) == "a"
    assert sent(server)[1:] == [("GET", "/v1/streams/cmpl-1", None)]


@pytest.mark.usefixtures("_without_delay")
@pytest.mark.parametrize("status", [404, 405, 410, 500])
def test_where_a_stream_cannot_go_on_its_break_is_raised(server: FakeServer, driver: Driver, status: int) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="cut", first=1)
    server.error(status, "there is no such thing")
    came: list[Chunk] = []
    with pytest.raises(BrokenConnectionError):
        driver.stream("stream_complete", "x", into=came)
    assert text_of(came) == "partial"


@pytest.mark.usefixtures("_without_delay")
def test_a_stream_is_tried_again_as_often_as_requests_are(server: FakeServer, driver: Driver) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="cut", first=1)
    for _ in range(3):
        server.stream(done=False, ending="cut")
    with pytest.raises(BrokenConnectionError):
        driver.stream("stream_complete", "x", settings={"max_retries": 3})
    assert [method for method, *_ in sent(server)] == ["POST", "GET", "GET", "GET", "DELETE"]


def test_without_retries_the_server_is_not_asked_to_hold_a_stream(server: FakeServer, driver: Driver) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="cut", first=1)
    with pytest.raises(BrokenConnectionError):
        driver.stream("stream_complete", "x", settings={"max_retries": 0})
    assert len(server.requests) == 1 and "x-stream-resume" not in server.requests[0].headers


@pytest.mark.usefixtures("_without_delay")
def test_an_error_in_a_stream_that_went_on_is_raised_as_it_is(server: FakeServer, driver: Driver) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="cut", first=1)
    server.stream(error_body("the engine failed", code="engine_error"), first=2)
    with pytest.raises(StreamError, match=r"^the engine failed$"):
        driver.stream("stream_complete", "x")


def test_a_stream_that_is_left_is_ended(server: FakeServer) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence", first=1)
    with ShoalClient(server.url) as client, client.stream_complete("x") as stream:
        next(stream)
    assert server.disconnected.wait(PATIENCE)
    assert sent(server)[1:] == [("DELETE", "/v1/streams/cmpl-1", None)]


def test_an_async_stream_that_is_left_is_ended(server: FakeServer) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence", first=1)

    async def run() -> None:
        async with AsyncShoalClient(server.url) as client:
            task = asyncio.create_task(collect(client))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def collect(client: AsyncShoalClient) -> None:
        async for _ in client.stream_complete("x"):
            begun.set()

    begun = asyncio.Event()
    asyncio.run(run())
    assert sent(server)[1:] == [("DELETE", "/v1/streams/cmpl-1", None)]
