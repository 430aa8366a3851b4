"""The tokenizer of a GGUF file, in the form that Hugging Face gives it.

The file names one of llama.cpp's tokenizers and holds its vocabulary.  `gpt2` is byte-level BPE; `tokenizer.ggml.pre`
names how it cuts a text before merging.  `llama` is SentencePiece's BPE, `t5` its unigram model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from shoal.model.checkpoint.gguf_file import GgufFile
from shoal.model.checkpoint.gguf_special import SPECIAL_TOKEN_KEYS, special_token_ids
from shoal.model.checkpoint.parts import TokenizerParts
from shoal.model.checkpoint.pre_tokenizers import CUTS, DEFAULT
from shoal.model.checkpoint.vocabulary import (
    Kind,
    Pieces,
    add_tokens,
    byte_level,
    sentencepiece_bpe,
    sentencepiece_unigram,
    surround,
)
from shoal.scheduler.errors import CheckpointError

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, with the kind of each, and the ids of the special ones by name."""

    tokens: list[str]
    kinds: list[int]
    special_ids: Mapping[str, int]

    def special(self, name: str) -> str:
        """The text of a special token."""
        return self.tokens[self.special_ids[name]]


def read_gguf_tokenizer(file: GgufFile) -> TokenizerParts:
    """The tokenizer and the chat templates.

    Raises:
        CheckpointError: naming the key that is missing, malformed, inconsistent, or of an unsupported kind.
    """
    vocabulary = _read_vocabulary(file)
    kind = file.metadata.get(f"{_PREFIX}model")
    if kind not in _KINDS:
        message = "missing" if kind is None else f"{kind!r} is not supported; supported: {', '.join(_KINDS)}"
        raise file.error(f"{_PREFIX}model", message)
    make, add_bos, add_eos = _KINDS[str(kind)]
    tokenizer = make(file, vocabulary)
    if kind == "gpt2":
        add_bos = CUTS[_pre(file)].add_bos
    surround(tokenizer, _added(file, vocabulary, "bos", add_bos), _added(file, vocabulary, "eos", add_eos))
    add_tokens(tokenizer, vocabulary.tokens, vocabulary.kinds)
    return TokenizerParts(
        tokenizer=tokenizer,
        special_tokens={f"{name}_token": vocabulary.special(name) for name in vocabulary.special_ids},
        chat_templates=_chat_templates(file),
    )


def _read_vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = file.strings(f"{_PREFIX}tokens")
    kinds: list[int] = [Kind.NORMAL] * len(tokens)
    if f"{_PREFIX}token_type" in file.metadata:
        kinds = _one_each(file, "token_type", len(tokens))
    if len(set(tokens)) < len(tokens):
        raise file.error(f"{_PREFIX}tokens", "a token appears twice")
    special_ids = special_token_ids(file)
    for name, token_id in special_ids.items():
        if token_id >= len(tokens):
            raise file.error(_PREFIX + SPECIAL_TOKEN_KEYS[name], f"{token_id} is not one of {len(tokens)} tokens")
    return _Vocabulary(tokens, kinds, special_ids)


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    return byte_level(ids, file.strings(f"{_PREFIX}merges"), CUTS[_pre(file)], _refusal(file))


def _pre(file: GgufFile) -> str:
    name = file.metadata.get(f"{_PREFIX}pre", DEFAULT)
    if name not in CUTS:
        raise file.error(f"{_PREFIX}pre", f"{name!r} is not supported; docs/gguf.md lists the {len(CUTS)} that are")
    return str(name)


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    return sentencepiece_bpe(_pieces(file, vocabulary), _refusal(file))


def _unigram(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    return sentencepiece_unigram(_pieces(file, vocabulary), _refusal(file))


# By name: what makes it, and whether a text begins with bos and ends with eos if the file does not say.
_KINDS: dict[str, tuple[Callable[[GgufFile, _Vocabulary], Tokenizer], bool, bool]] = {
    "gpt2": (_byte_level, False, False),
    "llama": (_sentencepiece, True, False),
    "t5": (_unigram, False, True),
}


def _pieces(file: GgufFile, vocabulary: _Vocabulary) -> Pieces:
    fields = file.section(_PREFIX)
    if "unk" not in vocabulary.special_ids:
        raise fields.error(SPECIAL_TOKEN_KEYS["unk"], "missing")
    charsmap = fields.get("precompiled_charsmap")
    return Pieces(
        tokens=vocabulary.tokens,
        kinds=vocabulary.kinds,
        scores=_one_each(file, "scores", len(vocabulary.tokens)),
        unknown_id=vocabulary.special_ids["unk"],
        byte_fallback=Kind.BYTE in vocabulary.kinds,
        prefix=fields.flag("add_space_prefix", default=True),
        squeezes=fields.flag("remove_extra_whitespaces", default=False),
        charsmap=b"" if charsmap is None else file.numbers(f"{_PREFIX}precompiled_charsmap").tobytes(),
    )


def _added(file: GgufFile, vocabulary: _Vocabulary, name: str, default: bool) -> tuple[str, int] | None:
    """The special token that a text begins or ends with, if the file says so."""
    fields = file.section(_PREFIX)
    if not fields.flag(f"add_{name}_token", default=default):
        return None
    if name not in vocabulary.special_ids:
        raise fields.error(SPECIAL_TOKEN_KEYS[name], f"missing, though a text is to begin or end with {name}")
    return vocabulary.special(name), vocabulary.special_ids[name]


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


def _refusal(file: GgufFile) -> Callable[[str, str], CheckpointError]:
    return lambda name, message: file.error(_PREFIX + name, message)
