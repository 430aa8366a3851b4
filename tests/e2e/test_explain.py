"""One request explained, and answers generated again, on real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from anthropic import Anthropic

from shoal import ShoalClient
from shoal.loadtest.explain import explain
from shoal.loadtest.replay import read_answer, replay
from shoal.loadtest.trace import read_whole_trace
from shoal.receipts import receipt_sha256, tokens_sha256
from shoal.scheduler.explanation import ANOTHER
from tests.e2e.conftest import API_KEYS, StartServer
from tests.e2e.harness import PATIENCE, Server, Waiting, run_shoal

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
SPECIFIED = {"name": "f", "input_schema": TOOL["function"]["parameters"]}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
MESSAGE: dict[str, Any] = HELLO | {"model": "tiny", "max_tokens": 9, "seed": 1}
INPUT: dict[str, Any] = {"input": "hello", "max_output_tokens": 9, "seed": 1, "ignore_eos": True}
TOLD = {"timing": True, "receipt": True}
ASKED: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "the cat", "temperature": 0}),
    (COMPLETIONS, {"prompt": [[5, 6, 7], [8]], "n": 2, "top_k": 20, "max_tokens": 9, "best_of": None}),
    (COMPLETIONS, {"prompt": "the cat", "stop": ["a", "e"], "max_tokens": 60, "echo": True, "logprobs": 2}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 12, "end_after": 7, "user": "me", "timeout": 200}),
    (COMPLETIONS, {"prompt": "a", "stream": True, "n": 2, "max_tokens": 9}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}),
    (CHAT, HELLO | {"max_tokens": 9, "seed": 2**60, "frequency_penalty": 1, "logprobs": True}),
    (CHAT, HELLO | {"stream": True, "max_completion_tokens": 9, "stream_options": {"include_usage": True}}),
    (CHAT, HELLO | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}),
    (CHAT, HELLO | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 40}),
    (CHAT, HELLO | {"tools": [TOOL], "tool_choice": "required", "stream": True, "max_tokens": 40}),
    (MESSAGES, MESSAGE | {"system": "Be brief.", "seed": 2**60, "metadata": {"user_id": "me"}}),
    (
        MESSAGES,
        MESSAGE | {"stop_sequences": ["a", "e"], "stream": True, "seed": None, "max_tokens": 60, "temperature": 1},
    ),
    (MESSAGES, MESSAGE | {"output_config": {"format": FORMAT}, "max_tokens": 60}),
    (MESSAGES, MESSAGE | {"tools": [SPECIFIED], "tool_choice": {"type": "any"}, "max_tokens": 40}),
    (MESSAGES, MESSAGE | {"tools": [SPECIFIED], "tool_choice": {"type": "any"}, "max_tokens": 40, "stream": True}),
    (RESPONSES, INPUT | {"instructions": "Be brief.", "seed": 2**60, "truncation": "auto", "store": False}),
    (
        RESPONSES,
        {"input": HELLO["messages"], "stream": True, "stop": ["a"], "include": ["message.output_text.logprobs"]},
    ),
    (RESPONSES, {"input": "hello", "text": {"format": {"name": "a", **FORMAT}}, "user": "me"}),
    (RESPONSES, INPUT | {"tools": [{"type": "function", **TOOL["function"]}], "tool_choice": "required"}),
    (RESPONSES, INPUT | {"tools": [{"type": "function", **TOOL["function"]}], "stream": True, "service_tier": "auto"}),
]


def kept(server: Server, folder: Path, path: str, body: dict[str, Any]) -> Path:
    """A file with the answer as it came."""
    response = server.post(path, **body, receipt=True)
    assert response.status_code == 200, response.text
    file = folder / "response"
    file.write_bytes(response.content)
    return file


def streamed(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of a stream's events, whether they have names or not."""
    lines = server.post(path, **body, stream=True).text.split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[ShoalClient]:
    with ShoalClient(tiny.url, read_timeout=PATIENCE) as client:
        yield client


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[str(number) for number in range(len(ASKED))])
def test_an_answer_is_generated_again(
    tiny: Server, client: ShoalClient, tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    stored = read_answer(kept(tiny, tmp_path, path, body))
    assert stored.receipt.model.fingerprint == tiny.complete("a", max_tokens=1)["system_fingerprint"]
    assert len(stored.receipt.outputs) == len(getattr(stored.answer, "choices", [stored.answer]))
    found = replay(stored, client)
    assert (found.is_same, found.differences, found.notes) == (True, [], [])
    assert stored.answer is not None and stored.answer.usage is not None
    usage = stored.answer.usage.num_output_tokens
    assert not usage or found.num_tokens == usage


def test_the_command_says_the_same_or_names_the_token_that_differs(tiny: Server, tmp_path: Path) -> None:
    file = kept(tiny, tmp_path, COMPLETIONS, {"prompt": "the cat", "max_tokens": 6, "min_tokens": 6})
    code, said = run_shoal(tmp_path, "replay", str(file), "--url", tiny.url)
    assert (code, said) == (0, "the same: 6 tokens in 1 choices\n")
    answer = json.loads(file.read_bytes())
    output = answer["receipt"]["outputs"][0]
    was = output["token_ids"][3]
    output["token_ids"][3] = 9 if was != 9 else 10
    file.write_text(json.dumps(answer))
    code, said = run_shoal(tmp_path, "replay", str(file), "--url", tiny.url)
    assert code == 2
    assert "the receipt was changed" in said
    output["sha256"] = tokens_sha256(output["token_ids"])
    answer["receipt"]["sha256"] = receipt_sha256(answer["receipt"])
    file.write_text(json.dumps(answer))
    code, said = run_shoal(tmp_path, "replay", str(file), "--url", tiny.url, "--json")
    assert code == 1
    assert json.loads(said)["differences"] == [
        f"choice 0: token 3 of 6 was {output['token_ids'][3]}, and now it is {was}"
    ]


def test_a_server_is_started_for_a_replay(tiny: Server, tmp_path: Path, tiny_folder: Path) -> None:
    file = kept(tiny, tmp_path, CHAT, HELLO | {"max_tokens": 6, "n": 2, "temperature": 1})
    options = ("--model", str(tiny_folder), "--", "--threads", "1", "--num-blocks", "2048")
    assert run_shoal(tmp_path, "replay", str(file), *options) == (0, "the same: 12 tokens in 2 choices\n")


def test_a_response_that_was_kept_is_generated_again_with_the_conversation_before_it(
    tiny: Server, client: ShoalClient, tmp_path: Path
) -> None:
    """Made in the background, and again by a server that does not know the conversation any more."""
    first = client.respond(**INPUT)
    reference = {"type": "item_reference", "id": first.output[0]["id"]}
    forms: list[dict[str, Any]] = [
        {"previous_response_id": first.id, "background": True},
        {"input": [{"role": "user", "content": "hello"}, reference, {"role": "user", "content": "hello"}]},
    ]
    ids = [
        streamed(tiny, RESPONSES, INPUT | forms[0] | TOLD)[0]["response"]["id"],
        tiny.post(RESPONSES, **INPUT | forms[1] | TOLD).json()["id"],
    ]
    kept = [tiny.http.get(f"{RESPONSES}/{one}").content for one in ids]
    client.delete_response(first.id)
    prompts = []
    for content in kept:
        assert json.loads(content)["timing"]["choices"][0]["num_output_tokens"] == 9
        (tmp_path / "response").write_bytes(content)
        stored = read_answer(tmp_path / "response")
        prompts.append(stored.receipt.prompts)
        found = replay(stored, client)
        assert (found.is_same, found.num_tokens, found.differences, found.notes) == (True, 9, [], [])
    assert prompts[0] == prompts[1]


def test_what_was_changed_in_a_message_or_a_response_is_found(
    tiny: Server, client: ShoalClient, tmp_path: Path
) -> None:
    for path, body, place in ((MESSAGES, MESSAGE, "content"), (RESPONSES, INPUT, "output")):
        file = kept(tiny, tmp_path, path, body)
        answer = json.loads(file.read_bytes())
        part = answer[place][0]
        (part if path == MESSAGES else part["content"][0])["text"] += "!"
        file.write_text(json.dumps(answer))
        found = replay(read_answer(file), client)
        assert not found.is_same
        assert "it was changed" in found.differences[0]


def test_plain_answers_are_as_they_were(tiny: Server) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, HELLO), (MESSAGES, MESSAGE), (RESPONSES, INPUT)):
        response = tiny.post(path, **body)
        assert response.status_code == 200
        events = streamed(tiny, path, body)
        for name in ("timing", "receipt"):
            assert f'"{name}"' not in response.text + json.dumps(events)
        assert path not in (COMPLETIONS, CHAT) or all(chunk["choices"] for chunk in events)


def test_the_end_of_a_stream_tells_what_the_whole_answer_tells(
    tiny: Server, client: ShoalClient, tmp_path: Path
) -> None:
    """In Anthropic's protocol beside the usage, in the Responses API in the response."""
    for path, body in ((MESSAGES, MESSAGE), (RESPONSES, INPUT)):
        asked = body | TOLD | {"seed": 5}
        *others, last = (
            one.get("response", one) for one in streamed(tiny, path, asked) if one["type"] != "message_stop"
        )
        assert not any({"timing", "receipt"} & event.keys() for event in others)
        whole = tiny.post(path, **asked).json()
        assert last["usage"]["output_tokens"] == last["timing"]["choices"][0]["num_output_tokens"] == 9
        assert whole["timing"].keys() == last["timing"].keys()
        assert whole["receipt"]["outputs"] == last["receipt"]["outputs"]
        assert whole["receipt"]["endpoint"] == last["receipt"]["endpoint"] == path
        (tmp_path / "end").write_text(json.dumps(last))
        assert replay(read_answer(tmp_path / "end"), client).is_same
    with client.stream_message(**MESSAGE | TOLD) as message, client.stream_respond(**INPUT | TOLD) as response:
        for one in (
            message.whole(),
            response.whole(),
            client.message(**MESSAGE | TOLD),
            client.respond(**INPUT | TOLD),
        ):
            assert one.timing is not None and one.receipt is not None
            assert one.timing[0]["num_output_tokens"] == one.receipt["outputs"][0]["num_tokens"] == 9


def test_the_last_chunk_of_a_stream_tells_it_all(tiny: Server, client: ShoalClient) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, HELLO)):
        *others, last = tiny.stream(path, **body, max_tokens=3, ignore_eos=True, timing=True, receipt=True)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == last["timing"]["choices"][0]["num_output_tokens"] == 3
        assert not any({"timing", "receipt"} & chunk.keys() for chunk in others)
    how: dict[str, Any] = {"max_tokens": 3, "n": 2, "ignore_eos": True, "receipt": True}
    with client.stream_complete("a", **how, timing=True) as stream:
        streamed = stream.whole()
    assert streamed.timing is not None
    assert streamed.receipt is not None
    assert [one["num_output_tokens"] for one in streamed.timing] == [3, 3]
    whole = client.complete("a", **how, seed=streamed.seed or 0)
    assert whole.receipt is not None
    assert whole.receipt["outputs"] == streamed.receipt["outputs"]


def test_the_clients_of_both_apis_read_it(tiny: Server) -> None:
    how: dict[str, Any] = {"max_retries": 0, "timeout": PATIENCE, "api_key": "unused"}
    told = TOLD | {"seed": 1}
    message: dict[str, Any] = HELLO | {"model": "tiny", "max_tokens": 9, "extra_body": told}
    with Anthropic(base_url=tiny.url, http_client=anthropic.DefaultHttpxClient(trust_env=False), **how) as claude:
        whole = claude.messages.create(**message).model_extra
        with claude.messages.stream(**message) as stream:
            (end,) = [event.model_extra for event in stream if event.type == "message_delta"]
            assert stream.get_final_message().stop_reason is not None
    assert whole and end and whole["receipt"]["outputs"] == end["receipt"]["outputs"]
    asked: dict[str, Any] = {"model": "tiny", "input": "hello", "max_output_tokens": 9, "extra_body": told}
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{tiny.url}/v1", http_client=http, **how) as client:
        whole = client.responses.create(**asked).model_extra
        *_, last = client.responses.create(**asked, stream=True)
        final = last.response.model_extra
        assert whole and final and whole["receipt"]["outputs"] == final["receipt"]["outputs"]
        assert client.responses.retrieve(last.response.id).model_extra == final


def test_a_header_asks_for_timing_too(tiny: Server) -> None:
    def ask(word: str, path: str, body: dict[str, Any]) -> Any:
        return tiny.http.post(path, json=body, headers={"x-shoal-timing": word}).json()

    for path, body in ((COMPLETIONS, {"prompt": "a", "max_tokens": 1}), (MESSAGES, MESSAGE), (RESPONSES, INPUT)):
        assert "timing" in ask("true", path, body)
        assert "timing" not in ask("false", path, body)
        error = ask("maybe", path, body)["error"]
        if path == MESSAGES:
            assert error["type"] == "invalid_request_error" and error["message"].startswith("x-shoal-timing")
        else:
            assert error["param"] == "x-shoal-timing"


def test_what_the_live_engine_says_is_what_its_trace_says(start: StartServer, tmp_path: Path) -> None:
    """Of requests in chunks, side by side, with speculation: for each choice, to the last digit."""
    path = tmp_path / "trace.json"
    server = start(
        *("--trace", str(path), "--max-num-seqs", "3", "--max-chunk-tokens", "8", "--policy", "priority"),
        *("--speculation", "suffix", "--num-spec-tokens", "3"),
    ).wait_ready()
    waiting = [
        Waiting(server, COMPLETIONS, prompt="Z" * 20, temperature=0, max_tokens=40, n=2, timing=True, priority=priority)
        for priority in (900, 0, 500)
    ]
    answers = [one.answer().json() for one in waiting]
    server.wait_idle()
    trace, timings = read_whole_trace(path), [one for answer in answers for one in answer["timing"]["choices"]]
    for timing in timings:
        explained = explain(trace, timing["request_id"])
        assert timing == msgspec.to_builtins(explained.timing)
        assert "speculated" in explained.why_not
        assert timing["num_output_tokens"] == 40
    assert max(timing["num_prefill_chunks"] for timing in timings) >= 3
    assert any(timing["num_accepted_tokens"] for timing in timings)
    assert sum(timing["num_companions"] for timing in timings) > 0
    for answer in answers:
        accepted = sum(timing["num_accepted_tokens"] for timing in answer["timing"]["choices"])
        assert accepted == answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]


def test_requests_of_another_api_key_are_not_named(strict: Server) -> None:
    """`strict` has room for two requests at once."""
    other = {"authorization": f"Bearer {API_KEYS[0]}"}
    body = {"prompt": "Z", "temperature": 0, "max_tokens": 400, "timing": True}
    with strict.http.stream(
        "POST", COMPLETIONS, json=body | {"stream": True, "max_tokens": 8000}, headers=other
    ) as one:
        lines = one.iter_lines()
        next(lines)
        theirs = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))["id"]
        response = strict.post(COMPLETIONS, **body)
    (timing,) = response.json()["timing"]["choices"]
    assert timing["max_batch"] == 2
    assert timing["num_companions"] == 1
    assert timing["companions"] == []
    assert theirs not in response.text
    assert ANOTHER not in response.text
