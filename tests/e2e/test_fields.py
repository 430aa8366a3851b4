"""The fields that users of other servers send: each is taken, ignored and named, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.checkpoints import cycle_checkpoint
from tests.e2e.harness import Server

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
TAGS = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a"]}
DICE = 'root ::= "x" | "y"'


def said(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, *messages, USER]}


# What a chat may have beside its messages, and is answered with 200.
TAKEN: list[dict[str, Any]] = [
    {"stream": True, "stream_options": {"include_obfuscation": False}},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"prompt_cache_retention": "24h"},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "auto"},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
    {"response_format": {"type": "structural_tag", **TAGS}},
    {"structured_outputs": {"regex": "a+b"}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"structured_outputs": {"grammar": DICE}},
    {"structured_outputs": {"json": SCHEMA}},
    {"guided_json": SCHEMA},
    {"guided_regex": "a+b"},
    {"guided_choice": ["a", "b"]},
    {"regex": "a+b"},
    {"ebnf": DICE},
    {"grammar": DICE},
    {"json_schema": SCHEMA},
    {"reasoning_effort": "low"},
    {"verbosity": "low"},
    {"include_reasoning": True},
    {"include_reasoning": False},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
    {"add_generation_prompt": False},
    {"messages": [USER, {"role": "assistant", "content": "ab"}]}
    | {"continue_final_message": True, "add_generation_prompt": False},
    {"add_special_tokens": True},
    {"documents": [{"title": "a", "text": "b"}]},
    {"echo": True},
    {"functions": [{"name": "f"}]},
    {"functions": [{"name": "f"}], "function_call": {"name": "f"}, "max_tokens": 100},
    said(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
    ),
    {"top_logprobs": 0},
    {"logprobs": False, "top_logprobs": 0},
    {"prompt_logprobs": 1},
    {"logprobs": True, "logprob_token_ids": [3, 1, 3]},
    {"best_of": 1},
    {"use_beam_search": False},
    {"length_penalty": 1},
    {"length_penalty": 1.0},
    {"stop": ""},
    {"stop": "z", "include_stop_str_in_output": True},
    {"repeat_penalty": 1.1},
    {"typical_p": 1.0},
    {"typical_p": 0.5, "temperature": 1.0},
    {"top_n_sigma": -1},
    {"top_n_sigma": 1.5, "temperature": 1.0},
    {"mirostat": 0},
    {"xtc_probability": 0.0},
    {"xtc_probability": 0.5, "xtc_threshold": 0.2, "temperature": 1.0},
    {"dry_multiplier": 0.0},
    {"allowed_token_ids": [5, 6, 7]},
    {"bad_words": ["a", "bc"]},
    {"bad_words": []},
    {"skip_special_tokens": True},
    {"skip_special_tokens": False},
    {"spaces_between_special_tokens": False},
    {"detokenize": True},
    {"truncate_prompt_tokens": 1},
    {"return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": 1},
    {"return_token_ids": True},
    {"request_id": "mine"},
    {"cache_salt": "abc"},
    {"stream_interval": 2},
    {"cache_prompt": True},
    {"n_predict": 2, "max_tokens": None},
    {"keep_alive": "5m"},
    {"prediction": {"type": "content", "content": "a"}},
    {"moderation": None},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}
        ]
    },
    said(
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ),
    {"messages": [USER, {"role": "tool", "tool_call_id": "call_1", "content": "1"}]},
    said({"role": "assistant", "content": "a", "reasoning_content": "b"}),
    said({"role": "assistant", "content": "a", "tool_calls": None}),
    said({"role": "assistant", "content": "a", "tool_calls": []}),
    said(
        {"role": "assistant", "content": "a", "annotations": [], "audio": None, "function_call": None, "refusal": None}
    ),
    {"max_tokens": 1000},
    {"max_tokens": -1, "stop": "a"},
    {"model": ""},
]
# Those that change nothing here, and are named in x-ignored-fields.
IGNORED: list[dict[str, Any]] = [
    {"separate_reasoning": True},
    {"no_stop_trim": True},
    {"return_tokens": True},
    {"rid": "a"},
    {"session_id": "a"},
    {"kv_transfer_params": {"a": 1}},
    {"vllm_xargs": {"a": 1}},
    {"mm_processor_kwargs": {"a": 1}},
    {"id_slot": 1},
    {"timings_per_token": True},
    {"return_progress": True},
    {"options": {"num_ctx": 2048}},
    {"think": True},
    {"moderation": {"a": 1}},
    {"web_search_options": {"search_context_size": "low"}},
    {"audio": {"voice": "alloy", "format": "wav"}},
    {"a_field_of_nobody": 1},
]
# Those that would change the text, or make no sense.
REFUSED: list[dict[str, Any]] = [
    {"stream_options": {"include_usage": True}},
    {"functions": [{"name": "f"}], "tools": []},
    {"best_of": 2},
    {"use_beam_search": True},
    {"typical_p": 1.5},
    {"top_n_sigma": 2000},
    {"mirostat": 2},
    {"xtc_probability": -0.1},
    {"xtc_threshold": 2},
    {"dry_multiplier": 0.8},
    {"temperature": 2.5},
    {"top_p": 0},
    {"logprob_token_ids": [1]},
    {"logprob_token_ids": [], "logprobs": True},
    {"logprob_token_ids": [*range(21)], "logprobs": True},
    {"logprob_token_ids": [1_000_000], "logprobs": True},
    *({"request_id": bad} for bad in ("", "a\r\nx-other: b", "a\n", "\U000e3826", "\xe9")),
    {"thinking_token_budget": 5},
    {"repetition_detection": {"max_pattern_size": 3}},
    {"lora_path": "a"},
    {"max_tokens": -2},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
    {"messages": [{"role": "USER", "content": "hi"}]},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fields")
    model = cycle_checkpoint(folder / "model")
    started = Server(folder, "--model", str(model), "--max-model-len", "1024").wait_ready()
    yield started
    started.close()


def ask(server: Server, fields: dict[str, Any], path: str = "chat/completions") -> Any:
    required = {"messages": [USER]} if path == "chat/completions" else {"prompt": "the cat"}
    return server.http.post(f"/v1/{path}", json={**required, "max_tokens": 2, "seed": 1} | fields)


@pytest.mark.parametrize("fields", TAKEN, ids=str)
def test_it_is_taken(server: Server, fields: dict[str, Any]) -> None:
    response = ask(server, fields)
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers


@pytest.mark.parametrize("fields", IGNORED, ids=str)
def test_it_is_ignored_and_named(server: Server, fields: dict[str, Any]) -> None:
    response = ask(server, fields)
    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-fields"] == ", ".join(fields)
    assert response.json()["choices"] == ask(server, {}).json()["choices"]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_it_is_refused_by_name(server: Server, fields: dict[str, Any]) -> None:
    response = ask(server, fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(fields))
