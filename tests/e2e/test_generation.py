"""What a completion consists of: choices, prompts, seeds, stops, limits, biases, log-probabilities."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from shoal.server.sampling import choice_seed
from tests.e2e.checkpoints import CYCLE, VOCAB_SIZE, cycle_text
from tests.e2e.harness import Server, joined

PROMPT = "the cat sat"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 20}


@pytest.fixture(scope="module")
def oracle(tiny_folder: Path) -> Any:
    model: Any = MixtralForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model.eval()


def log_softmax(oracle: Any, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size]; row i is of the token after token i."""
    with torch.no_grad():
        return torch.log_softmax(oracle(torch.tensor([token_ids])).logits[0].double(), dim=-1)


# -- choices, prompts, seeds -------------------------------------------------------------------------------------------


def test_a_choice_is_the_answer_to_a_seed_of_its_own(tiny: Server) -> None:
    many = tiny.complete(PROMPT, n=3, seed=2**64 - 2, **SAMPLED)["choices"]
    alone = [tiny.text(PROMPT, seed=choice_seed(2**64 - 2, i), **SAMPLED) for i in range(3)]
    assert [choice["text"] for choice in many] == alone
    assert len(set(alone)) == 3
    chunks = tiny.stream("/v1/completions", prompt=PROMPT, n=3, seed=2**64 - 2, **SAMPLED)
    assert [joined(chunks, i) for i in range(3)] == alone
    chat = tiny.chat("hi", n=2, seed=7, **SAMPLED)["choices"]
    one = tiny.chat("hi", seed=choice_seed(7, 1), **SAMPLED)["choices"][0]
    assert chat[1]["message"]["content"] == one["message"]["content"]
    twice = tiny.complete([PROMPT, PROMPT], seed=7, **SAMPLED)["choices"]
    assert twice[0]["text"] == twice[1]["text"], "equal prompts are requests with the same seed"


def test_prompts_of_every_kind(tiny: Server) -> None:
    texts = [PROMPT, "def add(", "größer 👍"]
    token_ids = [tiny.tokens(text) for text in texts]
    params = GREEDY | {"max_tokens": 8, "n": 2}
    expected = [text for prompt in texts for text in [tiny.text(prompt, **GREEDY, max_tokens=8)] * 2]
    for prompts in (texts, token_ids):
        answer = tiny.complete(prompts, **params)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert answer["usage"]["prompt_tokens"] == sum(map(len, token_ids))
        assert answer["usage"]["completion_tokens"] == 48
    assert tiny.text(token_ids[2], **GREEDY, max_tokens=8) == expected[4]


def test_a_drawn_seed_is_reported_and_gives_the_answer_again(tiny: Server) -> None:
    first, second = (tiny.post("/v1/completions", prompt=PROMPT, **SAMPLED) for _ in range(2))
    seed = first.json()["seed"]
    assert first.headers["x-seed"] == str(seed) != second.headers["x-seed"]
    again = tiny.text(PROMPT, seed=seed, **SAMPLED)
    assert again == first.json()["choices"][0]["text"] != second.json()["choices"][0]["text"]
    chunks = tiny.stream("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], **SAMPLED)
    assert joined(chunks) == tiny.chat("hi", seed=chunks[0]["seed"], **SAMPLED)["choices"][0]["message"]["content"]


# -- what ends it ------------------------------------------------------------------------------------------------------


def test_stop_strings_end_the_text_wherever_tokens_begin(strict: Server) -> None:
    """The text is known, and each of its tokens is a byte: every string of two characters lies across tokens."""
    text = cycle_text(60)
    for start, length in itertools.product(range(len(CYCLE), 2 * len(CYCLE)), (1, 2, 3, 7)):
        stop = text[start : start + length]
        expected = text[: text.index(stop)]
        body: dict[str, Any] = {**GREEDY, "max_tokens": 60, "stop": ["nowhere", stop, stop + "later"]}
        answer = strict.complete("Z", **body)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (expected, "stop")
        assert answer["usage"]["completion_tokens"] == len((expected + stop).encode())
        chunks = strict.stream("/v1/completions", prompt="Z", **body)
        assert joined(chunks) == expected
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_what_looks_like_the_beginning_of_a_stop_string_comes_in_the_end(strict: Server) -> None:
    chunks = strict.stream("/v1/completions", prompt="Z", **GREEDY, max_tokens=21, stop="a数é👍Za数é👍ZX")
    assert joined(chunks) == cycle_text(21)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_strings_of_the_text_of_a_random_model(tiny: Server) -> None:
    params = GREEDY | {"max_tokens": 40}
    choice = tiny.complete(PROMPT, **params, logprobs=0)["choices"][0]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    borders = sorted({at for at in offsets if 0 < at < len(text) - 1})
    assert len(borders) > 5
    for at in borders:
        stop = text[at - 1 : at + 2]
        expected = text[: text.index(stop)]
        assert tiny.text(PROMPT, **params, stop=stop) == expected
        messages = {"prompt": PROMPT, **params, "stop": stop}
        assert joined(tiny.stream("/v1/completions", **messages)) == expected


def test_stop_token_ids_and_end_of_text(tiny: Server, oracle: Any) -> None:
    prompt = tiny.tokens(PROMPT)
    whole = tiny.complete(prompt, **GREEDY, max_tokens=12, logprobs=0)
    token_ids = list(prompt)
    for _ in range(12):
        token_ids.append(int(log_softmax(oracle, token_ids)[-1].argmax()))
    chosen = token_ids[len(prompt) :]
    assert whole["choices"][0]["text"] == tiny.post("/detokenize", tokens=chosen).json()["prompt"]

    stop = next(token_id for i, token_id in enumerate(chosen) if i > 2 and token_id not in chosen[:i])
    at = chosen.index(stop)
    answer = tiny.complete(prompt, **GREEDY, max_tokens=12, stop_token_ids=[stop])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == at + 1
    assert answer["choices"][0]["text"] == tiny.post("/detokenize", tokens=chosen[:at]).json()["prompt"]

    # Until min_tokens are there a stop token cannot be chosen at all.
    forced = tiny.complete(prompt, temperature=0, max_tokens=12, min_tokens=9, logit_bias={"1": 100})
    assert forced["usage"]["completion_tokens"] == 10
    assert forced["choices"][0]["finish_reason"] == "stop"
    at_once = tiny.complete(prompt, temperature=0, max_tokens=12, logit_bias={"1": 100})
    assert (at_once["choices"][0]["text"], at_once["usage"]["completion_tokens"]) == ("", 1)
    ignored = tiny.complete(prompt, temperature=0, max_tokens=12, logit_bias={"1": 100}, ignore_eos=True)
    assert (ignored["usage"]["completion_tokens"], ignored["choices"][0]["finish_reason"]) == (12, "length")


def test_limits(tiny: Server) -> None:
    assert tiny.complete(PROMPT, **GREEDY)["usage"]["completion_tokens"] == 16
    assert tiny.chat("hi", **GREEDY, max_tokens=3)["usage"]["completion_tokens"] == 3
    both = tiny.chat("hi", **GREEDY, max_tokens=3, max_completion_tokens=5)
    assert both["usage"]["completion_tokens"] == 5
    long = [5] * 4090
    assert tiny.chat("x", **GREEDY, max_tokens=0)["usage"]["completion_tokens"] == 0
    assert tiny.complete(long, **GREEDY)["usage"]["completion_tokens"] == 6
    assert tiny.complete([5] * 4096, max_tokens=0)["usage"]["prompt_tokens"] == 4096


# -- what is chosen ----------------------------------------------------------------------------------------------------


def test_what_changes_the_choice(tiny: Server) -> None:
    greedy = tiny.text(PROMPT, **GREEDY, max_tokens=30)
    for params in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tiny.text(PROMPT, temperature=1, ignore_eos=True, max_tokens=30, **params) == greedy
    token_id = tiny.tokens("q")[0]
    assert tiny.text(PROMPT, **GREEDY, max_tokens=5, logit_bias={str(token_id): 100}) == "qqqqq"
    assert tiny.text(PROMPT, **GREEDY, max_tokens=30, top_k=-1) == greedy


def test_penalties_make_a_token_rarer(tiny: Server) -> None:
    """The bias is just large enough that the token repeats, so that a penalty changes the choice."""
    token_id = tiny.tokens("q")[0]

    def count(bias: float, **penalty: float) -> int:
        return tiny.text(PROMPT, **GREEDY, max_tokens=10, logit_bias={str(token_id): bias}, **penalty).count("q")

    bias = next(half / 2 for half in range(40) if count(half / 2) > 4)
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert count(bias, **penalty) < count(bias)
    plain = tiny.text(PROMPT, **GREEDY, max_tokens=30)
    assert tiny.text(PROMPT, **GREEDY, max_tokens=30, repetition_penalty=1.0) == plain
    assert tiny.text(PROMPT, **GREEDY, max_tokens=30, repetition_penalty=5.0) != plain


def test_characters_of_many_tokens_are_never_split(strict: Server) -> None:
    with strict.streaming("/v1/completions", prompt="Z", **GREEDY, max_tokens=44) as stream:
        texts = [chunk["choices"][0]["text"] for chunk in stream]
    assert "".join(texts) == CYCLE * 4
    assert set(texts) <= set(CYCLE) | {""}
    # Cut off inside a character, it ends as what UTF-8 says such bytes are.
    chunks = strict.stream("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert joined(strict.stream("/v1/completions", prompt="Z", **GREEDY, max_tokens=9)) == "a数é\ufffd"
    assert strict.text("Z", **GREEDY, max_tokens=9) == "a数é\ufffd"
    # The prompt may end inside a character, which the first tokens then complete.
    prompt = [*strict.tokens("Za"), *strict.tokens("数")[:2]]
    assert strict.text(prompt, **GREEDY, max_tokens=3) == "数é"


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_of_a_completion_are_those_of_transformers(tiny: Server, oracle: Any) -> None:
    prompt = tiny.tokens(PROMPT)
    body: dict[str, Any] = {"echo": True, "logprobs": 4, "max_tokens": 8, "ignore_eos": True, "seed": 3}
    choice = tiny.complete(prompt, **body)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(column) for column in logprobs.values()} == {len(prompt) + 8}
    assert choice["text"].startswith(PROMPT)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None

    names = vocabulary(tiny)
    token_ids = [names.index(token) for token in logprobs["tokens"]]
    assert token_ids[: len(prompt)] == prompt
    expected = log_softmax(oracle, token_ids)
    for i, token_id in enumerate(token_ids[1:], start=1):
        row = expected[i - 1]
        assert logprobs["token_logprobs"][i] == pytest.approx(float(row[token_id]), abs=1e-3)
        best = row.topk(4)
        top = dict(zip([names[int(j)] for j in best.indices], best.values.tolist(), strict=True))
        top.setdefault(names[token_id], float(row[token_id]))
        assert list(logprobs["top_logprobs"][i]) == list(top)
        assert logprobs["top_logprobs"][i] == pytest.approx(top, abs=1e-3)
    for token, (start, end) in zip(logprobs["tokens"], itertools.pairwise(logprobs["text_offset"]), strict=False):
        if not token.startswith("bytes:") and start < end:
            assert choice["text"][start:end].endswith(token)

    scored = tiny.complete(token_ids, echo=True, logprobs=4, max_tokens=0)["choices"][0]["logprobs"]
    assert scored["token_logprobs"][1:] == pytest.approx(logprobs["token_logprobs"][1:], abs=1e-3)
    chunks = tiny.stream("/v1/completions", prompt=prompt, **body)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for column in ("tokens", "text_offset"):
        assert [entry for part in parts for entry in part[column]] == logprobs[column]


def test_logprobs_of_a_chat_are_those_of_transformers(tiny: Server, oracle: Any) -> None:
    messages = [{"role": "user", "content": "hi 👍"}]
    prompt = tiny.post("/tokenize", messages=messages).json()["tokens"]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 8, "ignore_eos": True, "seed": 3}
    body |= {"logprobs": True, "top_logprobs": 2}
    content = tiny.post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]["content"]
    raw = [bytes(name, "utf-8") if not name.startswith("bytes:") else unescaped(name) for name in vocabulary(tiny)]
    chosen = [raw.index(bytes(entry["bytes"])) for entry in content]
    expected = log_softmax(oracle, prompt + chosen)[len(prompt) - 1 :]
    assert len(content) == 8
    for entry, token_id, row in zip(content, chosen, expected, strict=False):
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["token"] == bytes(entry["bytes"]).decode(errors="replace")
        assert entry["logprob"] == pytest.approx(float(row[token_id]), abs=1e-3)
        assert [raw.index(bytes(top["bytes"])) for top in entry["top_logprobs"]] == row.topk(2).indices.tolist()
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    streamed = [
        entry
        for chunk in tiny.stream("/v1/chat/completions", **body)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]
    without = tiny.post("/v1/chat/completions", **body | {"top_logprobs": 0}).json()
    assert all(entry["top_logprobs"] == [] for entry in without["choices"][0]["logprobs"]["content"])


def test_logprobs_of_named_tokens_are_those_of_transformers(tiny: Server, oracle: Any) -> None:
    """Their ids say which they are.  In completions the chosen one stands beside them; the prompt has its best ones."""
    body: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "seed": 3, "return_tokens_as_token_ids": True}
    named = [VOCAB_SIZE - 1, 5, 0]
    body |= {"logprob_token_ids": named}

    prompt = tiny.tokens(PROMPT)
    asked = body | {"logprobs": 1, "echo": True}
    logprobs = tiny.complete(prompt, **asked, prompt_logprobs=4)["choices"][0]["logprobs"]
    token_ids = [id_of(token) for token in logprobs["tokens"]]
    expected = log_softmax(oracle, token_ids)
    for i, token_id in enumerate(token_ids[1:], start=1):
        row = expected[i - 1]
        wanted = named if i >= len(prompt) else row.topk(1).indices.tolist()
        wanted = list(dict.fromkeys([*wanted, token_id]))
        assert [id_of(token) for token in logprobs["top_logprobs"][i]] == wanted
        assert list(logprobs["top_logprobs"][i].values()) == pytest.approx(row[wanted].tolist(), abs=1e-3)
    parts = [chunk["choices"][0]["logprobs"] for chunk in tiny.stream("/v1/completions", prompt=prompt, **asked)]
    assert [list(top or ()) for part in parts for top in part["top_logprobs"]] == [
        list(top or ()) for top in logprobs["top_logprobs"]
    ]

    messages = [{"role": "user", "content": "hi 👍"}]
    prompt = tiny.post("/tokenize", messages=messages).json()["tokens"]
    asked = body | {"messages": messages, "logprobs": True, "top_logprobs": 7}
    content = tiny.post("/v1/chat/completions", **asked).json()["choices"][0]["logprobs"]["content"]
    chosen = [id_of(entry["token"]) for entry in content]
    assert len(chosen) == 8
    for entry, row in zip(content, log_softmax(oracle, prompt + chosen)[len(prompt) - 1 :], strict=False):
        assert [id_of(top["token"]) for top in entry["top_logprobs"]] == named
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(row[named].tolist(), abs=1e-3)

    asked = {"input": "hi 👍", "include": ["message.output_text.logprobs"], "logprob_token_ids": named}
    asked |= {"max_output_tokens": 8, "ignore_eos": True, "seed": 3}
    (item,) = tiny.post("/v1/responses", **asked).json()["output"]
    entries = item["content"][0]["logprobs"]
    assert [[top["bytes"] for top in entry["top_logprobs"]] for entry in entries] == [
        [top["bytes"] for top in entry["top_logprobs"]] for entry in content
    ]


def id_of(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def test_a_banned_token_has_a_finite_logprob(tiny: Server) -> None:
    logprobs = tiny.complete(PROMPT, **GREEDY, max_tokens=3, logprobs=20)["choices"][0]["logprobs"]
    assert all(math.isfinite(value) for top in logprobs["top_logprobs"] for value in top.values())


def vocabulary(server: Server) -> list[str]:
    """How the completions API names each token: its text, or its bytes where they are no text."""
    tokens = server.complete(list(range(VOCAB_SIZE)), echo=True, logprobs=0, max_tokens=0)
    names: list[str] = tokens["choices"][0]["logprobs"]["tokens"]
    assert len(set(names)) == VOCAB_SIZE
    return names


def unescaped(name: str) -> bytes:
    return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
