"""What a server says of its model, a prefix cache that is emptied, and texts that are filled in."""

from __future__ import annotations

import json
from pathlib import Path

import anthropic
import openai
import pytest
from tokenizers import Tokenizer

from shoal.model.text.middle import SPELLINGS
from tests.e2e.checkpoints import random_checkpoint
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server

BEFORE, AFTER = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))"


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, three of whose tokens are for filling in."""
    folder = random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "filling")
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    taken = sorted(written["model"]["vocab"].items(), key=lambda one: -one[1])[:3]
    for (piece, token_id), content in zip(taken, SPELLINGS[0], strict=True):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        written["added_tokens"].append({"id": token_id, "content": content, "special": True, **flags})
        del written["model"]["vocab"][piece]
        written["model"]["vocab"][content] = token_id
    whole = {merge if isinstance(merge, str) else " ".join(merge): merge for merge in written["model"]["merges"]}
    gone = {piece for piece, _ in taken}
    written["model"]["merges"] = [
        merge for text, merge in whole.items() if not {*text.split(" "), text.replace(" ", "")} & gone
    ]
    path.write_text(json.dumps(written))
    Tokenizer.from_file(str(path))
    return folder


def test_a_text_is_filled_in(start: StartServer, filling: Path) -> None:
    server = start("--model", str(filling)).wait_ready()
    written = "".join((SPELLINGS[0][0], BEFORE, SPELLINGS[0][1], AFTER, SPELLINGS[0][2]))
    how = {"temperature": 0, "max_tokens": 12}
    asked = server.complete(BEFORE, suffix=AFTER, **how)
    ends = server.post("/tokenize", prompt="".join(SPELLINGS[0]), add_special_tokens=False).json()["tokens"]
    by_hand = server.complete(written, stop_token_ids=ends, **how)
    assert (
        asked["choices"] == by_hand["choices"] and asked["usage"]["prompt_tokens"] == by_hand["usage"]["prompt_tokens"]
    )
    tokens = server.post("/tokenize", prompt=BEFORE, add_special_tokens=False).json()["tokens"]
    assert server.complete(tokens, suffix=AFTER, **how)["choices"] == by_hand["choices"]
    two = server.complete([BEFORE, "import "], suffix=AFTER, **how)["choices"]
    assert len(two) == 2 and two[0] == by_hand["choices"][0]
    refused = server.post("/v1/completions", prompt=BEFORE, suffix=AFTER, echo=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")
    assert server.get("/v1/models").json()["data"][0]["capabilities"]["fill_in_middle"] is True


def test_a_model_that_cannot_fill_in_says_so(tiny: Server) -> None:
    refused = tiny.post("/v1/completions", prompt=BEFORE, suffix=AFTER)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "suffix" and "not trained to fill in the middle" in error["message"]


def test_models_are_what_both_kinds_of_client_read(tiny: Server) -> None:
    with openai.OpenAI(
        base_url=f"{tiny.url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as one:
        (model,) = one.models.list().data
        openai.types.Model.model_validate(model.model_dump(), strict=True)
    http = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(base_url=tiny.url, api_key="none", http_client=http) as other:
        (info,) = other.models.list().data
        assert (info.id, info.type, info.created_at.timestamp()) == (model.id, "model", model.created)
        assert other.models.retrieve(model.id) == info
    said = tiny.get("/v1/models").json()["data"][0]
    assert said["max_model_len"] == 4096 and said["capabilities"]["chat"] and not said["capabilities"]["fill_in_middle"]


def test_the_tokenizer_is_told(tiny: Server, tiny_folder: Path) -> None:
    told = tiny.get("/tokenizer_info").json()
    config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    assert told["chat_template"] == config["chat_template"]
    assert told["special_tokens"]["bos_token"] == config["bos_token"]
    assert told["added_tokens_decoder"]["1"] == {"content": "<|eos|>", "special": True}
    assert (told["vocab_size"], told["model_max_length"], told["is_byte_level"]) == (320, 4096, True)


def test_no_prefix_is_found_after_a_reset(tiny: Server) -> None:
    how = {"prompt": list(range(2, 120)), "max_tokens": 4, "temperature": 0, "cache_salt": "reset"}

    def ask() -> tuple[str, int]:
        answer = tiny.complete(**how)
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    text, _ = ask()
    assert ask() == (text, 112)
    assert tiny.post("/reset_prefix_cache").status_code == 200
    assert ask() == (text, 0)
    assert ask() == (text, 112)
