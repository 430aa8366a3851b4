"""Answers that were kept are read, and what was changed of them is found; without a server."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest

from shoal.clients import Completion, ShoalClient, wire
from shoal.loadtest.records import LoadTestError
from shoal.loadtest.replay import read_answer, replay, server_settings
from shoal.receipts import receipt_sha256, tokens_sha256


def output(*token_ids: int) -> dict[str, Any]:
    return {"num_tokens": len(token_ids), "sha256": tokens_sha256([*token_ids]), "token_ids": [*token_ids]}


def receipt(*outputs: dict[str, Any], **others: Any) -> dict[str, Any]:
    settings = {"backend": "auto", "dtype": "float32", "quantization": "none", "trace": "/etc/passwd"}
    made: dict[str, Any] = {
        "version": 1,
        "server": "0.1.0",
        "endpoint": "/v1/completions",
        "model": {"name": "m", "fingerprint": "fp_1", "sha256": "ab", "settings": settings},
        "request": {"prompt": "a", "stream": True, "max_tokens": 3, "user": "me", "temperature": None},
        "sampling": {"temperature": 0.5, "seed": 7, "max_tokens": 3, "top_p": 1.0},
        "prompts": [[1]],
        "outputs": list(outputs or [output(5, 6, 7)]),
    } | others
    return made | {"sha256": receipt_sha256(made)}


def answer(told: dict[str, Any], *texts: str) -> dict[str, Any]:
    choices = [{"index": index, "text": text, "finish_reason": "length"} for index, text in enumerate(texts or ["xyz"])]
    usage = {"prompt_tokens": 1, "completion_tokens": 3}
    return {"id": "cmpl-1", "created": 1, "model": "m", "choices": choices, "usage": usage, "receipt": told}


END_OF_MESSAGE = {"type": "message_delta", "receipt": receipt(endpoint="/v1/messages")}


class FakeClient:
    """Answers with what it was given, and notes what it was asked."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.answer: Completion[Any] = wire.complete("", {}).parse(json.dumps(told))
        self.asked: dict[str, Any] = {}

    def complete(self, prompt: str, **fields: Any) -> Completion[Any]:
        self.asked = {"prompt": prompt, **fields}
        return self.answer


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "response.json"


def replayed(kept: Path, before: dict[str, Any], after: dict[str, Any]) -> tuple[bool, list[str], list[str]]:
    kept.write_text(json.dumps(before))
    found = replay(read_answer(kept), cast(ShoalClient, FakeClient(after)))
    return found.is_same, found.differences, found.notes


def test_the_request_is_sent_again_with_what_was_resolved(kept: Path) -> None:
    kept.write_text(json.dumps(answer(receipt())))
    client = FakeClient(answer(receipt()))
    assert replay(read_answer(kept), cast(ShoalClient, client)).is_same
    sampling = {"temperature": 0.5, "seed": 7, "max_tokens": 3, "top_p": 1.0}
    assert client.asked == {"prompt": "a", "receipt": True} | sampling


def test_the_first_token_that_differs_is_named(kept: Path) -> None:
    before = answer(receipt(output(5, 6, 7), output(1, 2)), "xyz", "ab")
    after = answer(receipt(output(5, 9, 7), output(1)), "x?z", "a")
    assert replayed(kept, before, after)[:2] == (
        False,
        [
            "choice 0: token 1 of 3 was 6, and now it is 9",
            "choice 1: it had 2 tokens, and now it has 1, else the same",
        ],
    )


def test_what_else_differs_is_said(kept: Path) -> None:
    model = {"name": "m", "fingerprint": "fp_2", "sha256": "cd", "settings": {"dtype": "bfloat16"}}
    is_same, differences, notes = replayed(
        kept, answer(receipt()), answer(receipt(model=model, server="0.2.0", prompts=[[2]]))
    )
    assert (is_same, differences) == (True, [])
    assert notes[0] == "the model differs: its sha256 was ab, and now it is cd"
    assert "the setting dtype was 'float32', and now it is 'bfloat16'" in notes
    assert "Shoal was version 0.1.0, and now it is 0.2.0" in notes
    assert "the prompt has other tokens" in notes[-1]


def test_a_text_that_was_changed_is_found(kept: Path) -> None:
    is_same, differences, _ = replayed(kept, answer(receipt(), "changed"), answer(receipt(), "xyz"))
    assert not is_same
    assert differences == ["choice 0: the tokens are the same, but what was kept is not what they say: it was changed"]
    is_same, differences, _ = replayed(kept, answer(receipt(), "xyz", "more"), answer(receipt(), "xyz"))
    assert not is_same
    assert differences == ["2 choices were kept, but the receipt has 1: they were changed"]


@pytest.mark.parametrize("shape", ["events", "list", "last"])
def test_a_stream_is_read_as_it_came_or_as_a_list_or_by_its_last_chunk_alone(kept: Path, shape: str) -> None:
    def chunk(choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        return {"id": "cmpl-1", "created": 1, "model": "m", "choices": choices, **others}

    pieces = [("xy", None), ("z", "length")]
    chunks = [chunk([{"index": 0, "text": text, "finish_reason": reason}]) for text, reason in pieces]
    chunks.append(chunk([], receipt=receipt()))
    texts = {
        "events": "".join(f"id: 1:{n}\ndata: {json.dumps(one)}\n\n" for n, one in enumerate(chunks)) + "data: [DONE]\n",
        "list": json.dumps(chunks),
        "last": json.dumps(chunks[-1]),
    }
    kept.write_text(texts[shape])
    stored = read_answer(kept)
    assert stored.receipt.outputs[0].token_ids == [5, 6, 7]
    assert isinstance(stored.answer, Completion)
    assert [choice.text for choice in stored.answer.choices] == ([] if shape == "last" else ["xyz"])
    assert replay(stored, cast(ShoalClient, FakeClient(answer(receipt())))).is_same


def test_the_end_of_a_message_alone_says_nothing_of_it(kept: Path) -> None:
    kept.write_text(json.dumps(END_OF_MESSAGE))
    assert read_answer(kept).answer is None


def changed(told: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    made = deepcopy(told)
    place = made
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return made


def with_own_hash(told: dict[str, Any]) -> dict[str, Any]:
    return told | {"sha256": receipt_sha256(told)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither|no answer"),
        ("{", "neither JSON nor a stream"),
        ("[" * 100_000, "neither JSON nor a stream"),
        ("[]", "no answer"),
        ("[1]", "no answer"),
        ("hello", "no answer"),
        ("data: {", "neither JSON nor a stream"),
        ('{"error": {"message": "no"}}', "no receipt"),
        (json.dumps(answer(receipt()) | {"receipt": None}), "no receipt"),
        (json.dumps(answer(receipt()) | {"receipt": 5}), "version 'None'"),
        (json.dumps(answer(changed(receipt(), "version", to=2))), "version '2', and this Shoal reads 1"),
        (json.dumps(answer(changed(receipt(), "sampling", "seed", to=8))), "receipt was changed"),
        (json.dumps(answer(changed(receipt(), "outputs", 0, "token_ids", 1, to=9))), "receipt was changed"),
        (
            json.dumps(answer(with_own_hash(changed(receipt(), "outputs", 0, "token_ids", 1, to=9)))),
            "tokens of choice 0 were changed",
        ),
        (json.dumps(answer(with_own_hash(changed(receipt(), "endpoint", to="/x")))), "'/x' cannot be replayed"),
        (json.dumps(answer(with_own_hash(changed(receipt(), "prompts", to="a")))), "malformed: .*prompts"),
        (json.dumps(answer(receipt()) | {"choices": [{"index": 0}]}), "no whole answer"),
        (json.dumps({"type": "message", "receipt": receipt(endpoint="/v1/messages")}), "no whole answer"),
        (json.dumps([{"type": "ping"}, END_OF_MESSAGE]), "no whole answer"),
        (json.dumps({"response": {"receipt": receipt(endpoint="/v1/responses")}}), "no whole answer"),
    ],
)
def test_what_cannot_be_replayed_is_refused(kept: Path, text: str, message: str) -> None:
    kept.write_text(text)
    with pytest.raises(LoadTestError, match=message) as caught:
        read_answer(kept)
    assert len(str(caught.value)) < 300 + len(str(kept))


def test_a_file_that_is_not_there_or_not_text_is_refused(kept: Path) -> None:
    with pytest.raises(LoadTestError, match="cannot be read"):
        read_answer(kept)
    kept.write_bytes(b"\xff\xfe")
    with pytest.raises(LoadTestError, match="cannot be read"):
        read_answer(kept)


def test_programs_that_write_numbers_otherwise_change_nothing(kept: Path) -> None:
    told = receipt()
    kept.write_text(json.dumps(answer(told | {"sampling": told["sampling"] | {"top_p": 1}})))
    read_answer(kept)


def test_a_receipt_names_no_other_settings_of_a_server_than_those_that_change_numbers(kept: Path) -> None:
    kept.write_text(json.dumps(answer(receipt())))
    assert server_settings(read_answer(kept).receipt).keys() == {
        "backend",
        "device",
        "dtype",
        "quantization",
        "kv_cache_dtype",
    }


def test_a_server_without_receipts_is_refused(kept: Path) -> None:
    kept.write_text(json.dumps(answer(receipt())))
    plain = {name: value for name, value in answer(receipt()).items() if name != "receipt"}
    with pytest.raises(LoadTestError, match="gives no receipt"):
        replay(read_answer(kept), cast(ShoalClient, FakeClient(plain)))
