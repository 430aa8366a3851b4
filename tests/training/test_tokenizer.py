"""The tokenizer: lossless, and tokens of a prompt that are a prefix of the tokens of what follows it."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from shoal.model.training.corpus import Document
from shoal.model.training.tokenizer import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    load_tokenizer,
    train_tokenizer,
    write_tokenizer_config,
)
from shoal.model.training.tokens import encode_documents
from shoal.scheduler.errors import CheckpointError, ConfigError

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(alphabet="ab_1( \t\n\r.é漢🙂")
TINY = train_tokenizer([inspect.getsource(json.decoder), inspect.getsource(inspect)], vocab_size=600)


def ids(text: str, tokenizer: Tokenizer = TINY) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@given(texts)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TINY.decode(ids(text), skip_special_tokens=False) == text


@given(texts, texts)
def test_a_prompt_that_ends_in_a_newline_is_a_prefix(head: str, tail: str) -> None:
    prompt = ids(head + "\n")
    assert ids(head + "\n" + tail)[: len(prompt)] == prompt


@given(texts, st.integers(2, 12), st.text(alphabet="abcdef(\"'#1", min_size=1))
def test_a_prompt_that_ends_in_an_indentation_is_a_prefix(head: str, blanks: int, tail: str) -> None:
    prompt = ids(head + "\n" + " " * blanks)
    assert ids(head + "\n" + " " * blanks + tail)[: len(prompt)] == prompt


def test_a_newline_and_a_digit_are_tokens_of_their_own() -> None:
    vocabulary = TINY.get_vocab(with_added_tokens=False)
    assert [token for token in vocabulary if "Ċ" in token] == ["Ċ"]
    assert all(len(token) == 1 for token in vocabulary if any(map(str.isdigit, token)))


def test_a_text_begins_with_end_of_text() -> None:
    assert TINY.encode("x").ids == [TINY.token_to_id(END_OF_TEXT), *ids("x")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TINY.save(str(tmp_path / "tokenizer.json"))
    write_tokenizer_config(tmp_path, max_length=64)
    return tmp_path


def test_training_sees_chats_as_the_template_writes_them(folder: Path) -> None:
    hub: Any = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " Hello\n"},
        {"role": "assistant", "content": "def f():\n    return 1\n"},
    ]
    trained = encode_documents(
        [Document("p", "a.py#0", tuple(message["content"] for message in messages))],
        load_tokenizer(folder / "tokenizer.json"),
    )
    assert trained.tolist() == hub.apply_chat_template(messages)["input_ids"]
    prompt = hub.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert trained.tolist()[: len(prompt)] == prompt


def test_the_template_refuses_an_unknown_role(folder: Path) -> None:
    hub: Any = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(Exception, match="unknown role wizard"):
        hub.apply_chat_template([{"role": "wizard", "content": "x"}])


def test_a_document_that_spells_a_special_token_is_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokens = encode_documents([Document("p", "a.py", ("x = '<|end|>'\n",))], tokenizer).tolist()
    assert tokens[0] == tokenizer.token_to_id(END_OF_TEXT)
    assert not {tokenizer.token_to_id(token) for token in SPECIAL_TOKENS} & set(tokens[1:])
    assert tokenizer.decode(tokens[1:]) == "x = '<|end|>'\n"


def test_a_tokenizer_without_the_special_tokens_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|end|>", "<|fin|>"))
    with pytest.raises(CheckpointError, match=r"no token <\|end\|>"):
        load_tokenizer(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_tokenizer(folder / "nowhere")


def test_a_corpus_that_is_too_small_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 1000") as error:
        train_tokenizer(["ab"], vocab_size=1000)
    assert error.value.param == "vocab_size"
