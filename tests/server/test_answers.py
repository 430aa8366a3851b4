"""Large answers are made in slices: between two of them others have their turn."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import FinishReason, RequestOutput, SchedulerStats, TokenLogprobs
from shoal.server.engine.messages import News, Ready
from shoal.server.routes.chat import chat_router
from shoal.server.routes.completions import completions_router
from shoal.server.routes.pieces import HOLE, MAX_PIECE_BYTES, MAX_VALUES, encode_entries, filled, in_pieces
from shoal.server.settings import resolve
from shoal.server.setup import build_service
from shoal.server.wire.responses import TokenizeResult
from tests.e2e.checkpoints import cycle_checkpoint

NUM_CHOICES, NUM_PROMPT_TOKENS, NUM_TOKENS, NUM_TOP = 64, 120, 20, 20
MAX_AT_ONCE = 3000  # tokens and alternatives that are made into JSON at once, in some milliseconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cycle_checkpoint(tmp_path_factory.mktemp("checkpoints") / "cycle")


class Played:
    """A service whose engine is played by hand: it scores prompts, and says the same tokens to all."""

    def __init__(self, folder: Path) -> None:
        self.service, self._client = build_service(resolve({"model": str(folder)}))
        limits = SchedulerConfig(max_model_len=8192, num_blocks=4096, max_num_seqs=64, max_num_batched_tokens=512)
        self._client.connect(Ready(limits, 1, 1, "by hand", None), lambda command: None)

    async def play(self) -> None:
        while not (names := list(self._client._unfinished)):  # noqa: ASYNC110 (it is about turns)
            await asyncio.sleep(0)
        submission = self._client._unfinished[names[0]]
        for name in names:
            scored = range(1, len(submission.journals[name].request.prompt_token_ids))
            await self._say(submission, [RequestOutput(name, [], prompt_logprobs=[_scores(at) for at in scored])])
        for at in range(NUM_TOKENS):
            reason = FinishReason.LENGTH if at == NUM_TOKENS - 1 else None
            await self._say(submission, [RequestOutput(one, [at], reason, logprobs=[_scores(at)]) for one in names])

    async def _say(self, submission: Any, outputs: list[RequestOutput]) -> None:
        self._client.take(News(outputs, SchedulerStats(0, 0, 0.0, 0, 0, 0)))
        while submission._backlog:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[list[bytes], list[int]]:
        """The pieces of an answer, and how many tokens were made into text in each turn of the loop."""
        turns = [0]
        token_bytes = self.service.tokenizer.token_bytes

        def counted(token_id: int) -> bytes:
            turns[-1] += 1
            return token_bytes(token_id)

        async def turn() -> None:
            while True:
                turns.append(0)
                await asyncio.sleep(0)

        self.service.tokenizer.token_bytes = counted  # type: ignore[method-assign]
        router = chat_router if "chat" in path else completions_router
        others = asyncio.create_task(turn()), asyncio.create_task(self.play())
        (route,) = router(self.service).routes
        response = await route.endpoint(_request(path, body))  # type: ignore[attr-defined]
        pieces = await _sent(response)
        for task in others:
            task.cancel()
        await self.service.templates.close()
        return pieces, turns


def _scores(seed: int) -> TokenLogprobs:
    tops = [(seed + at) % 320 for at in range(NUM_TOP)]
    return TokenLogprobs(-1.5, 1, tops, [-0.25 * at for at in range(NUM_TOP)])


def _request(path: str, body: dict[str, Any]) -> Request:
    content = json.dumps(body).encode()
    messages = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        return await asyncio.Event().wait()

    return Request({"type": "http", "method": "POST", "path": path, "headers": []}, receive)


async def _sent(response: Response) -> list[bytes]:
    """The pieces of an answer's body, which are together as long as its head says."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    await response({"type": "http"}, receive, send)
    pieces = [message["body"] for message in sent[1:]]
    length = dict(sent[0]["headers"]).get(b"content-length")
    assert length is None or int(length) == sum(map(len, pieces))
    return pieces


def asked(path: str, stream: bool) -> dict[str, Any]:
    common = {"n": NUM_CHOICES, "max_tokens": NUM_TOKENS, "stream": stream, "ignore_eos": True}
    if "chat" in path:
        return common | {"messages": [{"role": "user", "content": "Z"}], "logprobs": True, "top_logprobs": NUM_TOP}
    return common | {"prompt": [90] * NUM_PROMPT_TOKENS, "logprobs": NUM_TOP, "echo": True}


def entries(logprobs: dict[str, Any]) -> list[Any]:
    """One for each token, of either shape."""
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(zip(*(logprobs[name] for name in sorted(logprobs)), strict=True))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_with_many_alternatives_is_made_and_sent_in_turns(folder: Path, path: str) -> None:
    async def scene() -> None:
        played = Played(folder)
        pieces, turns = await played.ask(path, asked(path, stream=False))
        assert max(turns) <= MAX_AT_ONCE < sum(turns) / 5
        assert max(map(len, pieces)) <= MAX_PIECE_BYTES < sum(map(len, pieces)) / 10
        whole = json.loads(b"".join(pieces))["choices"]

        pieces, turns = await played.ask(path, asked(path, stream=True))
        assert max(turns) <= MAX_AT_ONCE < sum(turns) / 5
        events = [json.loads(event.partition(b"data: ")[2]) for event in b"".join(pieces).split(b"\n\n")[:-2]]
        streamed: dict[int, list[Any]] = {index: [] for index in range(NUM_CHOICES)}
        for choice in (choice for event in events for choice in event["choices"] if choice["logprobs"]):
            streamed[choice["index"]] += entries(choice["logprobs"])
        num_scored = NUM_TOKENS if "chat" in path else NUM_PROMPT_TOKENS + NUM_TOKENS
        for index, choice in enumerate(whole):
            assert entries(choice["logprobs"]) == streamed[index]
            assert len(streamed[index]) == num_scored

    asyncio.run(scene())


def test_a_long_list_is_encoded_in_turns() -> None:
    async def scene() -> None:
        values = list(range(20 * MAX_VALUES + 1))
        num_turns = 0

        async def turn() -> None:
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        pieces = filled(TokenizeResult(len(values), 1, HOLE), [await encode_entries(values)])
        result = in_pieces(pieces, {"x-seed": "7"})
        assert num_turns >= 20
        pieces = await _sent(result)
        turning.cancel()
        assert max(map(len, pieces)) <= MAX_PIECE_BYTES
        assert json.loads(b"".join(pieces)) == {"count": len(values), "max_model_len": 1, "tokens": values}
        assert (result.headers["x-seed"], result.headers["content-type"]) == ("7", "application/json")

    asyncio.run(scene())


@pytest.mark.parametrize("values", [[], [1], [1, 2]])
def test_a_short_list_fills_its_hole(values: list[int]) -> None:
    pieces = filled(TokenizeResult(9, 1, HOLE), [asyncio.run(encode_entries(values))])
    assert json.loads(b"".join(pieces)) == {"count": 9, "max_model_len": 1, "tokens": values}
