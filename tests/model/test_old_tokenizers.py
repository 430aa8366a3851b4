"""Tokenizers of folders without a tokenizer.json, and chat templates in files of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HubTokenizer
from transformers import (
    AutoTokenizer,
    CodeGenTokenizer,
    CohereTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

from shoal.model.text.tokenizer import IncrementalDetokenizer, Tokenizer
from shoal.scheduler.errors import CheckpointError, InvalidRequestError
from tests.examples import examples

CORPUS = [
    "the cat sat on the mat, and the dog did not; it's 1234 or 12,345.67!",
    "größer naïve café, don't DON'T we'll I'LL",
    "数学は楽しい 😀👍🏽 привет мир",
    "a  b   c\n\n\tif x == 10_000:\r\n    return {'a': [1, 2]}  # ok\n",
]
text = st.text("abST'lL 012٣½²\n\r\t\u00a0.,!$+=<^~|`_-\"()é数я😀e\u0301", max_size=30)


# -- vocab.json and merges.txt -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary in the two files of GPT-2."""
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("merges")
    state = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, state["merges"]), ""]))
    return folder


def with_config(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("theirs", [GPT2Tokenizer, CodeGenTokenizer, GPTNeoXTokenizer, Qwen2Tokenizer, CohereTokenizer])
@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_a_vocabulary_with_merges_cuts_as_its_class(
    theirs: Any, add_prefix_space: bool, merges: Path, tmp_path: Path
) -> None:
    if add_prefix_space and theirs in (Qwen2Tokenizer, CohereTokenizer):
        with pytest.raises(CheckpointError, match="add_prefix_space: not supported with the class"):
            Tokenizer.load(with_config(merges, tmp_path, tokenizer_class=theirs.__name__, add_prefix_space=True))
        return
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": theirs.__name__, "add_prefix_space": add_prefix_space, "add_bos_token": False}
    ours = Tokenizer.load(with_config(merges, tmp_path, **config, **names))
    state = json.loads((merges / "vocab.json").read_text())
    pairs = [tuple(line.split(" ")) for line in (merges / "merges.txt").read_text().split("\n")[1:-1]]
    oracle = theirs(vocab=state, merges=pairs, add_prefix_space=add_prefix_space, **names)

    @settings(max_examples=examples(200))
    @given(text)
    def check(sample: str) -> None:
        assert ours.encode(sample, add_special_tokens=False) == oracle.encode(sample, add_special_tokens=False)

    check()
    for sample in [*CORPUS, "a<|endoftext|>b"]:
        assert ours.encode(sample, add_special_tokens=False) == oracle.encode(sample, add_special_tokens=False)
    assert ours.bos_token_id == ours.eos_token_id == oracle.eos_token_id


def test_a_folder_of_gpt2_as_transformers_reads_it(merges: Path, tmp_path: Path) -> None:
    """Special tokens from their own file, and tokens that are added behind the vocabulary."""
    folder = with_config(merges, tmp_path, tokenizer_class="GPT2Tokenizer")
    size = len(json.loads((merges / "vocab.json").read_text()))
    special = {"bos_token": "<|endoftext|>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "<|im_start|>": size}))
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))
    sample = "<|im_start|>the cat<|im_end|> 12</s>"
    assert ours.encode(sample) == theirs.encode(sample)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.is_special(ours.eos_token_id) and ours.vocab_size == size + 2


def test_bos_is_added_where_the_folder_says_so(merges: Path, tmp_path: Path) -> None:
    """As OPT has it: GPT-2's tokenizer with a token before each text."""
    folder = with_config(merges, tmp_path, tokenizer_class="GPT2Tokenizer", add_bos_token=True, bos_token="</s>")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("the cat") == [
        tokenizer.bos_token_id,
        *tokenizer.encode("the cat", add_special_tokens=False),
    ]
    assert tokenizer.begin_token_ids == [tokenizer.bos_token_id]


def test_what_is_wrong_with_merges(merges: Path, tmp_path: Path) -> None:
    folder = with_config(merges, tmp_path, tokenizer_class="NoneSuchTokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer_class: 'NoneSuchTokenizer' needs a tokenizer\.json; without"):
        Tokenizer.load(folder)
    with_config(merges, tmp_path, added_tokens_decoder={"9999": {"content": "<x>"}})
    with pytest.raises(CheckpointError, match="added_tokens_decoder: '<x>' has the id 9999, and would get"):
        Tokenizer.load(folder)
    with_config(merges, tmp_path)
    (folder / "merges.txt").write_text("q q\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt: merges: not those of a tokenizer"):
        Tokenizer.load(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt: cannot be read"):
        Tokenizer.load(folder)
    (folder / "vocab.json").write_text('{"a": "b"}')
    (folder / "merges.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"vocab\.json: expected the id of each token"):
        Tokenizer.load(folder)


# -- SentencePiece -----------------------------------------------------------------------------------------------------


def sentencepiece(algorithm: str, **options: Any) -> Any:
    """A model of SentencePiece, in the form of its own file, with random but plausible scores."""
    model = import_protobuf().ModelProto()
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    state = json.loads(tokenizer.to_str())["model"]
    learnt = [*dict.fromkeys("".join(pair) for pair in state["merges"])]
    letters = [piece for piece in state["vocab"] if len(piece) == 1 and piece not in "学👍"]
    rows = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    if options.get("byte_fallback", True):
        rows += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    rows += [(piece, -float(i + 1), 1) for i, piece in enumerate([*learnt, *letters])]
    for piece, score, kind in rows:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = {"unigram": 1, "bpe": 2, "word": 3}[algorithm]
    model.trainer_spec.byte_fallback = options.get("byte_fallback", True)
    model.trainer_spec.unk_id = 0
    model.normalizer_spec.add_dummy_prefix = options.get("add_dummy_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = options.get("remove_extra_whitespaces", False)
    return model


def store(folder: Path, model: Any, **config: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("off", ["", "add_dummy_prefix", "remove_extra_whitespaces", "byte_fallback"])
def test_a_sentencepiece_model_as_transformers_reads_it(algorithm: str, off: str, tmp_path: Path) -> None:
    options = {name: name != off for name in ("add_dummy_prefix", "remove_extra_whitespaces", "byte_fallback")}
    model = sentencepiece(algorithm, **options)
    ours = Tokenizer.load(store(tmp_path, model, add_bos_token=False))
    rows = [(piece.piece, piece.score) for piece in model.pieces]
    vocabulary = {piece: i for i, (piece, _) in enumerate(rows)} if algorithm == "bpe" else rows
    oracle = SpmConverter.build_tokenizer_from_spm_proto(model, vocabulary)
    squeezes = options["remove_extra_whitespaces"]

    @settings(max_examples=examples(150))
    @given(text)
    def check(sample: str) -> None:
        ids = ours.encode(sample)
        assert ids == oracle.encode(sample).ids
        detokenizer = IncrementalDetokenizer(ours)
        streamed = "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()
        assert streamed == ours.decode(ids)
        if options["byte_fallback"] and not squeezes:
            assert streamed == sample

    check()


def test_special_tokens_of_a_sentencepiece_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(store(tmp_path, sentencepiece("bpe")))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("the</s>")[0] == 1 and tokenizer.encode("the</s>")[-1] == 2
    assert tokenizer.decode(tokenizer.encode("the cat</s>")) == "the cat"
    none = Tokenizer.load(
        store(tmp_path, sentencepiece("bpe"), bos_token="</s>", add_bos_token=False, add_eos_token=True)
    )
    assert none.bos_token_id == 2 and none.encode("a")[-1] == 2 and none.encode("a")[0] != 1


def test_a_prefix_only_at_the_beginning(tmp_path: Path) -> None:
    """`legacy: false`: after a special token no space is added."""
    model = sentencepiece("bpe")
    once, always = (Tokenizer.load(store(tmp_path, model, legacy=legacy)) for legacy in (False, True))
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    assert always.encode("a</s>a") == [1, ids["▁a"], 2, ids["▁a"]]
    assert once.encode("a</s>a") == [1, ids["▁a"], 2, ids["a"]]
    oracle = SpmConverter.build_tokenizer_from_spm_proto(model, ids, legacy=False)
    oracle.add_special_tokens([AddedToken("</s>", normalized=False)])
    assert once.encode("a</s>a cat", add_special_tokens=False) == oracle.encode("a</s>a cat").ids


def test_what_is_wrong_with_a_sentencepiece_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: kind 'word' .* a tokenizer\.json is needed"):
        Tokenizer.load(store(tmp_path, sentencepiece("word")))
    whole = sentencepiece("bpe").SerializeToString()
    for data in (whole[:-1], whole[: len(whole) // 2], b"IQ== 0\nIg== 1\n", b"\xff" * 40, b""):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model: .*a tokenizer\.json is needed"):
            Tokenizer.load(tmp_path)


@settings(max_examples=examples(200))
@given(place=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_damaged_sentencepiece_model_never_breaks_out(place: int, byte: int, tmp_path_factory: Any) -> None:
    data = bytearray(sentencepiece("bpe").SerializeToString())
    data[place % len(data)] = byte
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.model").write_bytes(data)
    try:
        Tokenizer.load(folder)
    except CheckpointError as error:
        assert "tokenizer.model" in error.message


@pytest.mark.parametrize("name", ["tekken.json", "sentencepiece.bpe.model", "qwen.tiktoken"])
def test_other_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name} alone is not supported; tokenizer\.json, tokenizer\.model, or"):
        Tokenizer.load(tmp_path)


# -- chat templates ----------------------------------------------------------------------------------------------------


def test_chat_templates_in_files_of_their_own(merges: Path, tmp_path: Path) -> None:
    """They replace those of tokenizer_config.json, as in transformers."""
    folder = with_config(
        merges,
        tmp_path,
        tokenizer_class="GPT2Tokenizer",
        chat_template=[{"name": "default", "template": "old"}, {"name": "rag", "template": "r"}],
    )
    messages, tools = [{"role": "user", "content": "hi"}], [{"type": "function"}]
    assert Tokenizer.load(folder).apply_chat_template(messages, tools=tools) == "old"
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.load(folder).apply_chat_template(messages)
    (folder / "chat_template.jinja").write_text("new")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.apply_chat_template(messages) == "new"
    assert tokenizer.apply_chat_template(messages, tools=tools) == "tools"
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert dict(tokenizer.chat_template.sources) == theirs.chat_template
