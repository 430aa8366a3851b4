"""The tokenizer of a GGUF file, as the `tokenizer.json` that it would have in a Hugging Face folder.

The file names one of llama.cpp's tokenizers and holds its vocabulary.  Two are supported.  `gpt2` is
byte-level BPE; `tokenizer.ggml.pre` names how it splits a text before merging.  `llama` is SentencePiece's BPE: it
prefers the merge whose result has the highest score, and text without a token becomes bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.model.checkpoint.gguf_file import GgufFile
from shoal.model.checkpoint.parts import TokenizerParts

Json = dict[str, Any]

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPECIAL_IDS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # where the file names none
# Types of tokens; normal, unused and byte-valued ones need nothing.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "▁"  # SentencePiece's letter for a space
_MAX_PIECE_LETTERS = 256  # every way to split a piece in two is looked up


def _split(regex: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _bytes(*, words: bool) -> Json:
    """The step from bytes to letters; `words` first splits the text as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a byte-level tokenizer splits a text into pieces, within which it merges.

    Attributes:
        steps: pre-tokenizers, in order.
        normalizer: runs before the steps, such as a Unicode normal form.
        whole_tokens: whether a piece that is a token skips the merges.
        add_bos: whether a text begins with bos if the file does not say.
    """

    steps: tuple[Json, ...]
    normalizer: Json | None = None
    whole_tokens: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _Cut(
    (_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _bytes(words=False)),
    whole_tokens=True,
    add_bos=True,
)
_DEFAULT = "default"
_CUTS = {
    # What llama.cpp uses for files that name none.
    _DEFAULT: _Cut(
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_GPT2),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _bytes(words=False),
        )
    ),
    "gpt-2": _Cut((_bytes(words=True),)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Cut((_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _bytes(words=False)), {"type": "NFC"}),
    "smollm": _Cut(({"type": "Digits", "individual_digits": True}, _bytes(words=True))),
}


def special_token_ids(file: GgufFile) -> dict[str, int]:
    """Ids of the special tokens that the file has: bos, eos, unk, pad, eot (end of turn), eom (end of message).

    Raises:
        CheckpointError: naming the key that holds no id.
    """
    fields = file.section(_PREFIX)
    ids = {name: fields.optional_integer(key) for name, key in _SPECIAL_IDS.items()}
    defaults = _SENTENCEPIECE_IDS if fields.get("model") == "llama" else {}
    return defaults | {name: token_id for name, token_id in ids.items() if token_id is not None}


def read_gguf_tokenizer(file: GgufFile) -> TokenizerParts:
    """The tokenizer and the chat templates.

    Raises:
        CheckpointError: naming the key that is missing, malformed, inconsistent, or of an unsupported kind.
    """
    vocabulary = _read_vocabulary(file)
    texts = {f"{name}_token": vocabulary.tokens[i] for name, i in vocabulary.special_ids.items()}
    return TokenizerParts(
        path=file.path,
        definition=json.dumps(_definition(file, vocabulary), ensure_ascii=False),
        special_tokens=texts,
        chat_templates=_chat_templates(file),
    )


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, with the type of each, and the ids of the special ones by name."""

    tokens: list[str]
    types: list[int]
    special_ids: Mapping[str, int]

    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def _read_vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = file.strings(f"{_PREFIX}tokens")
    types = [_NORMAL] * len(tokens)
    if f"{_PREFIX}token_type" in file.metadata:
        types = _one_each(file, "token_type", len(tokens))
    if len(set(tokens)) < len(tokens):
        raise file.error(f"{_PREFIX}tokens", "a token appears twice")
    special_ids = special_token_ids(file)
    for name, token_id in special_ids.items():
        if token_id >= len(tokens):
            raise file.error(_PREFIX + _SPECIAL_IDS[name], f"{token_id} is not one of {len(tokens)} tokens")
    return _Vocabulary(tokens, types, special_ids)


def _definition(file: GgufFile, vocabulary: _Vocabulary) -> Json:
    """The content of a tokenizer.json."""
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = file.metadata.get(f"{_PREFIX}model")
    if kind is None:
        raise file.error(f"{_PREFIX}model", "missing")
    if kind not in kinds:
        raise file.error(f"{_PREFIX}model", f"{kind!r} is not supported; supported: {', '.join(kinds)}")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        **kinds[str(kind)](file, vocabulary),
    }


def _added_tokens(vocabulary: _Vocabulary) -> list[Json]:
    """Tokens that are found in a text before it is split, and never merged."""
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> Json:
    name = file.metadata.get(f"{_PREFIX}pre", _DEFAULT)
    cut = _CUTS.get(str(name))
    if cut is None:
        raise file.error(f"{_PREFIX}pre", f"{name!r} is not supported; supported: {', '.join(_CUTS)}")
    return {
        "normalizer": cut.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut.steps},
        "post_processor": _ends(file, vocabulary, add_bos=cut.add_bos),
        "decoder": _bytes(words=True),
        "model": {
            "type": "BPE",
            "ignore_merges": cut.whole_tokens,
            "vocab": vocabulary.ids(),
            "merges": file.strings(f"{_PREFIX}merges"),
        },
    }


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Json:
    """The form that Llama 2 has on Hugging Face: a space is put before a text, and after each special token."""
    add_space = file.section(_PREFIX).flag("add_space_prefix", default=True)
    space = [{"type": "Prepend", "prepend": _SPACE}] if add_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*space, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": _ends(file, vocabulary, add_bos=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": vocabulary.tokens[vocabulary.special_ids["unk"]],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary.ids(),
            "merges": _merges_by_score(file, vocabulary),
        },
    }


def _merges_by_score(file: GgufFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in descending order of the token's score.

    SentencePiece merges by the score of the result and has no list of merges; this list has the same effect.
    """
    tokens, types = vocabulary.tokens, vocabulary.types
    scores = _one_each(file, "scores", len(tokens))
    pieces = {
        token: score
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    merges = []
    for piece in sorted(pieces, key=pieces.__getitem__, reverse=True):
        if len(piece) > _MAX_PIECE_LETTERS:
            message = f"a token of {len(piece)} letters; at most {_MAX_PIECE_LETTERS} are supported"
            raise file.error(f"{_PREFIX}tokens", message)
        # Of several pairs that make one piece, Hugging Face tries the one with the longest left part first.
        cuts = ((piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1))
        merges += [(left, right) for left, right in cuts if left in pieces and right in pieces]
    return merges


def _ends(file: GgufFile, vocabulary: _Vocabulary, *, add_bos: bool) -> Json | None:
    """The post-processor that puts bos before a text and eos after it, as the file asks for."""
    fields = file.section(_PREFIX)
    adds = {
        "bos": fields.flag("add_bos_token", default=add_bos),
        "eos": fields.flag("add_eos_token", default=False),
    }
    if not any(adds.values()):
        return None
    for name, is_added in adds.items():
        if is_added and name not in vocabulary.special_ids:
            raise fields.error(_SPECIAL_IDS[name], f"missing, though a text is to begin or end with {name}")
    texts = {name: vocabulary.tokens[vocabulary.special_ids[name]] for name, is_added in adds.items() if is_added}
    before = [_piece(texts[name]) for name in ("bos",) if name in texts]
    after = [_piece(texts[name]) for name in ("eos",) if name in texts]
    return {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            text: {"id": text, "ids": [vocabulary.special_ids[name]], "tokens": [text]} for name, text in texts.items()
        },
    }


def _piece(text: str) -> Json:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def _chat_templates(file: GgufFile) -> dict[str, str]:
    """The chat templates by name; the one without a name is the default."""
    templates = {}
    for key, value in file.metadata.items():
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            if not isinstance(value, str):
                raise file.error(key, f"expected a string, found {value!r}")
            templates[key[len(_TEMPLATE) + 1 :] or "default"] = value
    return templates


def _one_each(file: GgufFile, name: str, count: int) -> list[Any]:
    """The array of numbers, one for each token."""
    numbers: list[Any] = file.numbers(_PREFIX + name).tolist()
    if len(numbers) != count:
        raise file.error(_PREFIX + name, f"{len(numbers)} values for {count} tokens")
    return numbers
