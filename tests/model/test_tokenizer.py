from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HubTokenizer
from transformers import PreTrainedTokenizerFast

from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.text.tokenizer import IncrementalDetokenizer, Tokenizer
from shoal.scheduler.errors import CheckpointError, InvalidRequestError
from tests.examples import examples

CORPUS = [
    "the cat sat on the mat, and the dog did not",
    "größer naïve café",
    "数学は楽しい 😀👍🏽",
    "a  b   c\n\n\tif x:",
]


def byte_level() -> HubTokenizer:
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("ü ö"), AddedToken("😀")])
    return tokenizer


def byte_fallback(decoder: Any) -> HubTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "t", "h", "e", "▁t", "▁th", "▁the", "cat", "▁cat", "é", "数", "学", "▁数", "😀", "!", " "]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("▁", "数")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = HubTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool> x")])
    return tokenizer


LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
KINDS = {
    "byte-level": byte_level(),
    "llama": byte_fallback(decoders.Sequence(LLAMA_DECODER)),
    "gemma": byte_fallback(decoders.Sequence(LLAMA_DECODER[:3])),
    "metaspace": byte_fallback(decoders.Metaspace()),
    "no-decoder": byte_fallback(None),
}
TOKENIZERS = {name: Tokenizer(tokenizer) for name, tokenizer in KINDS.items()}

any_ids = st.lists(st.integers(-2, 350) | st.sampled_from([0, 1, 2, 229, 133, 175]), max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(300))
@given(ids=any_ids, skip=st.booleans())
def test_pieces_of_any_ids_make_the_text_of_the_whole(kind: str, ids: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZERS[kind], skip_special_tokens=skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    known = [i for i in ids if i >= 0]
    assert "".join(pieces) + detokenizer.flush() == KINDS[kind].decode(known, skip_special_tokens=skip)
    assert TOKENIZERS[kind].decode(ids, skip_special_tokens=skip) == KINDS[kind].decode(known, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
@settings(max_examples=examples(200))
@given(text=st.text() | st.sampled_from(CORPUS))
def test_any_text_comes_back_piece_by_piece_without_broken_characters(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces).replace(text, "") or "\ufffd" in text
    expected = KINDS[kind].decode(ids)
    assert "".join(pieces) + detokenizer.flush() == expected
    opening = " " if text and kind != "byte-level" else ""
    as_read = text if kind == "byte-level" else text.replace("▁", " ")
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == opening + as_read


def test_a_character_of_many_tokens_appears_at_once() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("数👍🏽", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) == "数👍🏽"
    assert len(ids) > 3 and "\ufffd" not in "".join(pieces)
    assert all(piece in ("", "数", "👍", "🏽", "数👍", "👍🏽") for piece in pieces)


def test_an_incomplete_character_is_held_back_until_the_end() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    first_byte = KINDS["byte-level"].token_to_id("Ã")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(first_byte) == ""
    assert detokenizer.flush() == "\ufffd"
    assert tokenizer.token_bytes(first_byte) == b"\xc3"


def test_token_bytes_of_fallback_bytes_special_and_unknown_tokens() -> None:
    tokenizer = TOKENIZERS["llama"]
    assert tokenizer.token_bytes(3 + 0xE6) == b"\xe6"
    assert tokenizer.token_bytes(KINDS["llama"].token_to_id("▁the")) == b" the"
    assert tokenizer.token_bytes(2) == b"</s>"
    assert tokenizer.token_bytes(10_000) == b"" == tokenizer.token_bytes(-1)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        TOKENIZERS["llama"].encode("a\ud800")


def test_an_unstreamable_decoder_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer(byte_fallback(decoders.WordPiece()))
    with pytest.raises(CheckpointError, match="Strip"):
        Tokenizer(byte_fallback(decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])))


def write(folder: Path, config: dict[str, Any] | None = None, kind: str = "byte-level") -> Path:
    KINDS[kind].save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_load_reads_special_tokens_and_ignores_truncation_and_padding(tmp_path: Path) -> None:
    write(tmp_path, {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None})
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.vocab_size == KINDS["byte-level"].get_vocab_size()
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_encode_and_decode_as_transformers(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"bos_token": "<s>", "eos_token": "</s>"}, kind)
    ours = Tokenizer.load(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    for text in [*CORPUS, "", " ", "<s>the</s>"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            theirs_text = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == theirs_text


@settings(max_examples=examples(100))
@given(text=st.text("ab é数\n", max_size=20), max_tokens=st.integers(1, 12))
def test_the_start_of_a_text_as_transformers_cuts_it(text: str, max_tokens: int) -> None:
    """With tokens around it, which stay."""
    ours, theirs = _with_tokens_around()
    found = ours.encode_start(text, max_tokens)
    if max_tokens < 2:
        assert len(found) == max_tokens
    else:
        assert found == theirs(text, truncation=True, max_length=max_tokens)["input_ids"]


@cache
def _with_tokens_around() -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    hub = HubTokenizer.from_file(str(resolve_checkpoint("shoal-moe") / "tokenizer.json"))
    around = [("<|endoftext|>", 0), ("a", hub.token_to_id("a"))]
    hub.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A a", special_tokens=around)
    return Tokenizer(HubTokenizer.from_str(hub.to_str())), PreTrainedTokenizerFast(tokenizer_object=hub)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    write(tmp_path, {"chat_template": [1]})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
        Tokenizer.load(tmp_path)


SPELT = st.text(max_size=20) | st.sampled_from(
    ["<|end|>", "<|system|>", "<|", "|>", "<|endoftext|>", "\ue000", "<<|end|>|end|>"]
)


@settings(max_examples=examples(300))
@given(contents=st.lists(st.lists(SPELT, max_size=4).map("".join), min_size=1, max_size=4))
def test_no_message_can_spell_a_turn_of_the_conversation(contents: list[str]) -> None:
    tokenizer = bundled()
    messages = [{"role": "user", "content": content} for content in contents]
    text, token_ids = tokenizer.encode_chat(messages)
    _, harmless = tokenizer.encode_chat([{"role": "user", "content": "hi"} for _ in contents])
    assert text == tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert list(filter(tokenizer.is_special, token_ids)) == list(filter(tokenizer.is_special, harmless))
    parsed = tokenizer.encode_chat(messages, parses_special=True)
    assert parsed == (text, tokenizer.encode(text, add_special_tokens=False))


@cache
def bundled() -> Tokenizer:
    return Tokenizer.load(resolve_checkpoint("shoal-moe"))


def test_a_message_without_special_tokens_has_the_usual_tokens() -> None:
    messages = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " <|en d|> 数 "}]
    text, token_ids = bundled().encode_chat(messages)
    assert token_ids == bundled().encode(text, add_special_tokens=False)
