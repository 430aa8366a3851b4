"""Both of our clients on the real server, beside the official ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest

from shoal.clients import AsyncShoalClient, BatchLine, MessageAnswer, Response, ShoalClient, StatusError
from tests.e2e.harness import PATIENCE, Server

MODEL = "shoal-moe"
HELLO: Any = [{"role": "user", "content": "Say something."}]
HOW: dict[str, Any] = {"temperature": 0, "seed": 5}


@pytest.fixture(scope="module")
def client(main: Server) -> Iterator[ShoalClient]:
    with ShoalClient(main.url, read_timeout=PATIENCE) as made:
        yield made


def alike(answer: Any) -> Any:
    """What two answers to the same request have in common."""
    usage = replace(answer.usage, num_cached_tokens=0)
    if isinstance(answer, Response):
        output = tuple({**item, "id": ""} for item in answer.output)
        return replace(answer, id="", created=0, request_id=None, usage=usage, output=output)
    if isinstance(answer, MessageAnswer):
        return replace(answer, id="", request_id=None, usage=usage)
    return replace(answer, id="", created=0, request_id=None, usage=usage)


def test_responses(main: Server, client: ShoalClient) -> None:
    asked: dict[str, Any] = {"instructions": "Be brief.", "max_output_tokens": 16}
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{main.url}/v1", api_key="unused", max_retries=0, http_client=http) as official:
        theirs = official.responses.create(model=MODEL, input=HELLO, temperature=0, extra_body={"seed": 5}, **asked)
    ours = client.respond(HELLO, **HOW, **asked)
    assert (ours.text, ours.status, ours.seed) == (theirs.output_text, theirs.status, 5)
    assert theirs.usage is not None
    assert (ours.usage and ours.usage.num_output_tokens) == theirs.usage.output_tokens
    assert ours.request_id == ours.id
    with client.stream_respond(HELLO, **HOW, **asked) as stream:
        assert "".join(event.text for event in stream) == ours.text
    assert alike(stream.whole()) == alike(ours)

    assert replace(client.response(ours.id), request_id=ours.id) == ours
    (item,) = (one for one in client.input_items(ours.id).data if one["type"] == "message")
    assert item["role"] == "user"
    second = client.respond("Go on.", previous_response_id=ours.id, **HOW, max_output_tokens=4)
    assert second.previous_response_id == ours.id
    assert second.usage is not None
    counted = client.count_input_tokens("Go on.", previous_response_id=ours.id)
    assert counted == second.usage.num_prompt_tokens
    client.delete_response(ours.id)
    with pytest.raises(StatusError):
        client.response(ours.id)


def test_a_response_in_the_background(client: ShoalClient) -> None:
    asked: dict[str, Any] = {"background": True, "max_output_tokens": 700, "ignore_eos": True, **HOW}
    with client.stream_respond(HELLO, **asked) as stream:
        begun = [next(stream) for _ in range(3)]
    assert begun[0].response is not None
    name = begun[0].response.id
    with client.stream_response(name, starting_after=begun[-1].sequence_number) as rest:
        events = begun + [next(rest) for _ in range(20)]
    assert [event.sequence_number for event in events] == list(range(23))
    assert client.cancel_response(name).status in ("cancelled", "incomplete")


def test_messages(main: Server, client: ShoalClient) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 16, "system": "Be brief."}
    http = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(base_url=main.url, api_key="unused", max_retries=0, http_client=http) as official:
        theirs = official.messages.create(messages=HELLO, extra_body=HOW, **asked)
        counted = official.messages.count_tokens(messages=HELLO, model=MODEL, system="Be brief.")
    ours = client.message(HELLO, **HOW, **asked)
    assert ours.text == "".join(block.text for block in theirs.content if block.type == "text")
    assert (ours.stop_reason, ours.usage.num_output_tokens) == (theirs.stop_reason, theirs.usage.output_tokens)
    assert client.count_tokens(HELLO, model=MODEL, system="Be brief.") == counted.input_tokens
    assert ours.usage.num_prompt_tokens == counted.input_tokens
    with client.stream_message(HELLO, **HOW, **asked) as stream:
        assert "".join(event.text for event in stream) == ours.text
    assert alike(stream.whole()) == alike(ours)
    assert client.message([*HELLO, ours.message, *HELLO], **HOW, **asked).blocks


def test_a_call_of_a_tool(client: ShoalClient) -> None:
    def weather(is_today: bool) -> str:
        """The weather."""
        return f"{is_today}"

    how: dict[str, Any] = {"tools": [weather], "tool_choice": weather, "parallel_tool_calls": False, **HOW}
    response = client.respond(HELLO, max_output_tokens=300, **how)
    items = [*HELLO, *response.output, *(call.result_item(weather(**call.arguments)) for call in response.tool_calls)]
    assert response.tool_calls and client.respond(items, max_output_tokens=2, **HOW).output
    del how["parallel_tool_calls"]
    with client.stream_message(HELLO, model=MODEL, max_tokens=300, **how) as stream:
        message = stream.whole()
    results: Any = [call.result_block(weather(**call.arguments)) for call in message.tool_calls]
    turns: Any = [*HELLO, message.message, {"role": "user", "content": results}]
    assert results and client.message(turns, model=MODEL, max_tokens=2).blocks


def test_what_a_completion_tells(client: ShoalClient) -> None:
    how: dict[str, Any] = {"max_tokens": 6, "return_token_ids": True, **HOW}
    whole = client.chat(HELLO, n=2, prompt_logprobs=1, request_id="mine", **how)
    assert whole.token_ids is not None and whole.prompt_token_ids is not None and whole.prompt_logprobs is not None
    assert len(whole.prompt_token_ids) == len(whole.prompt_logprobs) == whole.usage.num_prompt_tokens
    assert whole.request_id == "mine" and whole.system_fingerprint
    with client.stream_chat(HELLO, n=2, **how) as stream:
        streamed = stream.whole()
    bare = replace(whole, choices=tuple(replace(one, prompt_logprobs=None) for one in whole.choices))
    assert alike(streamed) == alike(bare)
    prompts = [list(whole.prompt_token_ids), [1, 2]]
    with client.stream_complete(prompts, **how) as stream:
        streamed = stream.whole()
    assert [list(one.prompt_token_ids or ()) for one in streamed.choices] == prompts
    assert alike(streamed) == alike(client.complete(prompts, **how))
    odd: Any = {"odd": 1}
    assert client.complete("a", max_tokens=1, **odd).ignored_fields == ("odd",)


def test_a_batch(main: Server) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": "import", "max_tokens": 4, **HOW}, {"prompt": "a", "max_tokens": -5}]
    lines = [
        BatchLine(custom_id=str(number), method="POST", url="/v1/completions", body=body)
        for number, body in enumerate(bodies)
    ]

    async def run() -> Any:
        async with AsyncShoalClient(main.url, read_timeout=PATIENCE) as client:
            file = await client.upload(lines, filename="ä.jsonl")
            assert (file.filename, (await client.file_content(file.id)).count(b"\n")) == ("ä.jsonl", 2)
            batch = await client.create_batch(file.id, "/v1/completions", metadata={"a": "b"})
            while not batch.is_ended:
                await asyncio.sleep(0.1)
                batch = await client.batch(batch.id)
            assert batch.metadata == {"a": "b"}
            assert batch.id in [one.id for one in (await client.batches(limit=5)).data]
            results = await client.batch_results(batch)
            for file_id in (file.id, *batch.result_file_ids):
                await client.delete_file(file_id)
            assert file.id not in [one.id for one in (await client.files(purpose="batch")).data]
            return results, await client.complete("import", max_tokens=4, **HOW)

    (good, bad), direct = asyncio.run(run())
    assert (good.custom_id, good.answer.text) == ("0", direct.text)
    assert (bad.custom_id, bad.error.status, bad.error.param) == ("1", 400, "max_tokens")


def test_what_a_server_tells_of_itself(client: ShoalClient) -> None:
    info, (model,) = client.server_info(), client.models()
    assert (info.model, info.limits["max_model_len"]) == (model.id, model.max_model_len)
    assert model.capabilities is not None and model.capabilities.chat and not model.capabilities.fill_in_middle
    assert client.tokenizer_info().model_max_length == model.max_model_len
    tokens = client.tokenize(HELLO, add_generation_prompt=False, return_token_strs=True)
    assert tokens.token_strs is not None and len(tokens.token_strs) == len(tokens.token_ids)
    client.reset_prefix_cache()
    assert client.load() >= 0
    assert client.health() and client.ready()
