from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from shoal.model.checkpoint.gguf_file import read_gguf
from shoal.model.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from shoal.model.checkpoint.pre_tokenizers import CUTS
from shoal.model.text.tokenizer import IncrementalDetokenizer, Tokenizer
from shoal.scheduler.errors import CheckpointError, InvalidRequestError
from tests.examples import examples
from tests.gguf_writer import write

CORPUS = [
    "the cat sat on the mat, and the dog did not; it's 1234 or 12,345.67!",
    "größer naïve café, don't DON'T we'll I'LL",
    "数学は楽しい 😀👍🏽 привет мир",
    "a  b   c\n\n\tif x == 10_000:\r\n    return {'a': [1, 2]}  # ok\n",
]
TEXTS = [*CORPUS, "", "\n", "a", "<s>the</s> cat", "x</s>y", "١٢٣ ½ Ⅷ 1st", "the\u00a0cat\u3000sat"]
# Letters, marks, digits, spaces and symbols that every version of Unicode puts in the same classes.
text = st.text("abST'lL 012٣½²\n\r\t\u00a0.,!$+=<^~|`_-\"()é数я😀", max_size=30)


def byte_level_vocabulary() -> dict[str, Any]:
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i < 2 else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_vocabulary() -> dict[str, Any]:
    """Pieces by training; the score of each is minus its rank, as SentencePiece writes it for BPE."""
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    state = json.loads(tokenizer.to_str())["model"]
    learnt = ["".join(pair) for pair in state["merges"]]
    letters = [piece for piece in state["vocab"] if len(piece) == 1 and piece not in "学👍"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(learnt), *letters]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


BYTE_LEVEL, SENTENCEPIECE = byte_level_vocabulary(), sentencepiece_vocabulary()


def load(folder: Path, base: dict[str, Any], **change: Any) -> Tokenizer:
    return Tokenizer.load(store(folder, base, **change))


def store(folder: Path, base: dict[str, Any], **change: Any) -> Path:
    """Keys without `tokenizer.ggml.`; None removes one."""
    metadata = base | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    present = {key: value for key, value in metadata.items() if value is not None}
    return write(folder / "tokenizer.gguf", present, {})


def transformers_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


# -- byte-level --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_ids_equal_transformers(pre: str, tmp_path: Path) -> None:
    path = store(tmp_path, BYTE_LEVEL, pre=pre)
    ours, theirs = Tokenizer.load(path), transformers_tokenizer(path)
    for sample in TEXTS:
        assert ours.encode(sample) == theirs.encode(sample)
        for skip in (True, False):
            ids = theirs.encode(sample)
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SHARED = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CJK = "[一-龥ࠀ-一가-퟿]+"
PRE_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How llama.cpp cuts: every pattern in turn, each cutting the pieces that the ones before have left.
LLAMA_CPP = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "llama-bpe": [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + SHARED],
    "qwen2": [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + SHARED],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", PRE_V3],
    "bloom": [r" ?[^(\s|.,!?…。，、।۔،)]+"],  # noqa: RUF001
    "viking": [r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"],  # noqa: RUF001
    "tekken": [TEKKEN],
    "gpt-4o": [GPT4O],
    "seed-coder": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
        r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "bailingmoe": [
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
}
# Pieces of one text under the cuts whose patterns no other engine reads.
TEXT = "Ab12345 cdE'll 数学ひら\u3000$9.5  x"
PIECES = {
    "deepseek-llm": "Ab|12345| cdE|'|ll| |数学ひら|\u3000|$|9|.|5| | x",
    "kimi-k2": "Ab|123|45| cd|E'll| |数学|ひら|\u3000|$|9|.|5| | x",
    "chameleon": "Ab|1|2|3|4|5| cdE|'|ll| 数学ひら|\u3000|$|9|.|5|  |x",
    "superbpe": "Ab|12|345| cdE'll 数学ひら\u3000$|9|.|5|  x",
    "tiny_aya": "Ab|12|345| cd|E'll| 数学ひら|\u3000|$|9|.|5| | x",
    "jais-2": "Ab|123|45| cdE|'ll| 数学ひら|\u3000|$|9|.|5| | x",
    "exaone-moe": "Ab|1|2|3|4|5| cdE|'ll| 数学ひら|\u3000|$|9|.|5| | x",
    "command-r": "Ab|1|2|3|4|5| cdE|'ll| 数学ひら|\u3000|$|9|.|5| | x",
}


def cut(pieces: list[str], pattern: str) -> list[str]:
    """Each piece in its matches and what lies between them."""
    return [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]


@pytest.mark.parametrize("pre", LLAMA_CPP)
def test_pieces_are_those_of_llama_cpp(pre: str, tmp_path: Path) -> None:
    tokenizer = read_gguf_tokenizer(read_gguf(store(tmp_path, BYTE_LEVEL, pre=pre))).tokenizer

    @settings(max_examples=examples(300))
    @given(text)
    def check(sample: str) -> None:
        expected = [sample]
        for pattern in LLAMA_CPP[pre]:
            expected = cut(expected, pattern)
        found = [sample[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(sample)]
        assert found == expected

    check()


@pytest.mark.parametrize("pre", PIECES)
def test_pieces_of_a_text(pre: str, tmp_path: Path) -> None:
    tokenizer = read_gguf_tokenizer(read_gguf(store(tmp_path, BYTE_LEVEL, pre=pre))).tokenizer
    found = [TEXT[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert "|".join(found) == PIECES[pre]


def test_every_name_cuts_without_loss() -> None:
    """No cut leaves anything out, takes anything twice, or breaks within a character."""
    cuts = [cut.pre_tokenizer() for cut in CUTS.values()]

    @settings(max_examples=examples(100))
    @given(text)
    def check(sample: str) -> None:
        for pre_tokenizer in cuts:
            places = [place for _, place in pre_tokenizer.pre_tokenize_str(sample)]
            assert "".join(sample[a:b] for a, b in places) == sample

    check()


def test_a_file_that_names_no_pre_tokenizer_has_the_default_one(tmp_path: Path) -> None:
    named, unnamed = load(tmp_path, BYTE_LEVEL, pre="default"), load(tmp_path, BYTE_LEVEL, pre=None)
    assert [named.encode(sample) for sample in TEXTS] == [unnamed.encode(sample) for sample in TEXTS]
    other = load(tmp_path, BYTE_LEVEL, pre="gpt-2")
    assert [named.encode(sample) for sample in TEXTS] != [other.encode(sample) for sample in TEXTS]


def test_qwen2_composes_characters_first(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, BYTE_LEVEL, pre="qwen2")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("café")


def test_llama3_takes_whole_tokens_before_merges(tmp_path: Path) -> None:
    """A token that no sequence of merges makes is found all the same."""
    tokens = [*BYTE_LEVEL["tokenizer.ggml.tokens"], "qzx"]
    types = [*BYTE_LEVEL["tokenizer.ggml.token_type"], 1]
    for pre, expected in (("llama-bpe", True), ("gpt-2", False)):
        ids = load(tmp_path, BYTE_LEVEL, pre=pre, tokens=tokens, token_type=types).encode("qzx")
        assert (ids == [len(tokens) - 1]) == expected


# -- SentencePiece -----------------------------------------------------------------------------------------------------


def test_sentencepiece_ids_equal_transformers(tmp_path: Path) -> None:
    """But where a text begins with a space, or follows a special token: see the next test."""
    path = store(tmp_path, SENTENCEPIECE)
    ours, theirs = Tokenizer.load(path), transformers_tokenizer(path)

    @settings(max_examples=examples(300))
    @given(text)
    def check(sample: str) -> None:
        if not sample.startswith((" ", "▁")):
            assert ours.encode(sample) == theirs.encode(sample)
            ids = ours.encode(sample, add_special_tokens=False)
            assert ours.decode(ids) == sample

    check()
    for sample in CORPUS:
        assert ours.encode(sample) == theirs.encode(sample)


def test_a_space_goes_before_every_text(tmp_path: Path) -> None:
    """As in llama.cpp and SentencePiece itself; transformers adds none to a text that begins with one."""
    tokenizer = load(tmp_path, SENTENCEPIECE)
    ids = {piece: i for i, piece in enumerate(SENTENCEPIECE["tokenizer.ggml.tokens"])}
    the = ids["▁the"]
    assert tokenizer.encode("the") == [1, the]
    assert tokenizer.encode(" the") == [1, ids["▁"], the]
    assert tokenizer.encode("the</s>the") == [1, the, 2, the]
    assert tokenizer.encode("學") == [1, ids["▁"], *(3 + byte for byte in "學".encode())]
    bare = load(tmp_path, SENTENCEPIECE, add_space_prefix=False)
    assert bare.encode(" the") == [1, the]
    assert bare.encode("a") == [1, ids["a"]]
    assert bare.decode(bare.encode(" the cat")) == " the cat"


def test_sentencepiece_has_special_tokens_unless_it_names_others(tmp_path: Path) -> None:
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"))
    tokenizer = load(tmp_path, SENTENCEPIECE, **ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("the") == load(tmp_path, SENTENCEPIECE).encode("the")


@pytest.mark.parametrize("base", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_texts_come_back_piece_by_piece(base: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load(tmp_path, base)
    for sample in CORPUS:
        detokenizer = IncrementalDetokenizer(tokenizer)
        ids = tokenizer.encode(sample)
        assert "".join(detokenizer.push(i) for i in ids) + detokenizer.flush() == sample


# -- unigram -----------------------------------------------------------------------------------------------------------


def test_unigram_takes_the_tokens_of_the_greatest_sum(tmp_path: Path) -> None:
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0, "a": -2.0, "b": -2.0, "ab": -5.0, "▁ba": -4.0}
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [*pieces],
        "tokenizer.ggml.scores": [*pieces.values()],
        "tokenizer.ggml.token_type": [3, 3, 2, 1, 1, 1, 1, 1],
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }
    tokenizer = load(tmp_path, metadata)
    assert tokenizer.encode("ab") == [3, 4, 5, 1]  # -7 and not the -8 of the token ab
    assert tokenizer.encode("  ba   ba ") == [7, 7, 1]
    assert tokenizer.encode("xa", add_special_tokens=False) == [3, 2, 4]
    assert tokenizer.eos_token_id == 1 and tokenizer.bos_token_id is None
    assert tokenizer.decode(tokenizer.encode("ba ab")) == "ba ab"


# -- special tokens and templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        (BYTE_LEVEL, {}, ""),
        (BYTE_LEVEL, {"add_bos_token": None}, ""),
        (BYTE_LEVEL, {"add_bos_token": None, "pre": "llama-bpe"}, "b"),
        (BYTE_LEVEL, {"add_bos_token": True}, "b"),
        (BYTE_LEVEL, {"add_eos_token": True}, "e"),
        (BYTE_LEVEL, {"add_bos_token": True, "add_eos_token": True}, "be"),
        (SENTENCEPIECE, {}, "b"),
        (SENTENCEPIECE, {"add_bos_token": False, "add_eos_token": True}, "e"),
    ],
)
def test_what_is_added_to_a_text(base: dict[str, Any], change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, base, **change)
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    before = [tokenizer.bos_token_id] if "b" in expected else []
    after = [tokenizer.eos_token_id] if "e" in expected else []
    assert tokenizer.encode("the cat") == [*before, *plain, *after]


def test_types_of_tokens(tmp_path: Path) -> None:
    """A control token is special, a user-defined one is text that is never cut; both are found in any text."""
    added = {"<|im_end|>": TokenType.CONTROL, "<think it>": TokenType.USER_DEFINED}
    tokens = [*BYTE_LEVEL["tokenizer.ggml.tokens"], *added]
    types = [*BYTE_LEVEL["tokenizer.ggml.token_type"], *map(int, added.values())]
    path = store(tmp_path, BYTE_LEVEL, tokens=tokens, token_type=types, eos_token_id=len(tokens) - 2)
    tokenizer = Tokenizer.load(path)
    end, think = len(tokens) - 2, len(tokens) - 1
    ids = tokenizer.encode("a<think it>b<|im_end|>")
    assert ids[1] == think and ids[3] == end
    assert tokenizer.decode(ids) == "a<think it>b"
    assert tokenizer.is_special(end) and not tokenizer.is_special(think)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, end)
    assert tokenizer.vocab_size == len(tokens)


def test_chat_templates(tmp_path: Path) -> None:
    templates = {
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "tokenizer.chat_template.tool_use": "tools",
    }
    tokenizer = load(tmp_path, BYTE_LEVEL | templates)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<s>hi</s>"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}]) == "tools"
    with pytest.raises(InvalidRequestError, match="no chat template"):
        load(tmp_path, BYTE_LEVEL).apply_chat_template(messages)


# -- what is wrong -----------------------------------------------------------------------------------------------------

TOKENS = BYTE_LEVEL["tokenizer.ggml.tokens"]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (BYTE_LEVEL, {"model": "bert"}, "ggml.model: 'bert' is not supported; supported: gpt2, llama"),
    (BYTE_LEVEL, {"model": None}, "ggml.model: missing"),
    (
        BYTE_LEVEL,
        {"pre": "none-such"},
        "ggml.pre: 'none-such' is not supported; docs/gguf.md lists the 67",
    ),
    (BYTE_LEVEL, {"tokens": None}, "ggml.tokens: missing"),
    (BYTE_LEVEL, {"tokens": "a"}, "ggml.tokens: expected an array"),
    (BYTE_LEVEL, {"merges": None}, "ggml.merges: missing"),
    (BYTE_LEVEL, {"tokens": [*TOKENS[:-1], TOKENS[5]]}, "ggml.tokens: a token appears twice"),
    (BYTE_LEVEL, {"token_type": [1, 1]}, r"ggml.token_type: 2 values for \d+ tokens"),
    (BYTE_LEVEL, {"bos_token_id": 10_000}, r"ggml.bos_token_id: 10000 is not one of \d+ tokens"),
    (BYTE_LEVEL, {"eos_token_id": "</s>"}, "ggml.eos_token_id: expected an integer of at least 0"),
    (BYTE_LEVEL, {"add_bos_token": 1}, "ggml.add_bos_token: expected true or false"),
    (BYTE_LEVEL, {"add_bos_token": True, "bos_token_id": None}, "ggml.bos_token_id: missing, though a text"),
    (BYTE_LEVEL, {"merges": ["q q"]}, "ggml.merges: not those of a tokenizer: .*out of vocabulary"),
    (BYTE_LEVEL, {"merges": ["q"]}, "ggml.merges: not those of a tokenizer: "),
    (BYTE_LEVEL | {"tokenizer.chat_template": 1}, {}, "chat_template: expected a string, found 1"),
    (BYTE_LEVEL | {"tokenizer.chat_template": "{% if %}"}, {}, "the chat template is not valid"),
    (SENTENCEPIECE, {"scores": None}, "ggml.scores: missing"),
    (SENTENCEPIECE, {"scores": [0.5]}, r"ggml.scores: 1 values for \d+ tokens"),
    (SENTENCEPIECE, {"tokens": ["<unk>"], "token_type": [2]}, "ggml.bos_token_id: 1 is not one of 1 tokens"),
]


@pytest.mark.parametrize(("base", "change", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_refuses_by_file_and_key(base: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer\.gguf: (tokenizer\.)?{message}"):
        load(tmp_path, base, **change)


def test_a_piece_that_would_take_for_ever_is_refused(tmp_path: Path) -> None:
    tokens = [*SENTENCEPIECE["tokenizer.ggml.tokens"][:-1], "a" * 300]
    with pytest.raises(CheckpointError, match="a token of 300 letters; at most 256 are supported"):
        load(tmp_path, SENTENCEPIECE, tokens=tokens)
