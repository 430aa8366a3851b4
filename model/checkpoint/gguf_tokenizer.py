"""The tokenizer of a GGUF file, in the form that Hugging Face gives it.

The file names one of llama.cpp's tokenizers and holds its vocabulary.  Two are supported.  `gpt2` is byte-level BPE;
`tokenizer.ggml.pre` names how it splits a text before merging.  `llama` is SentencePiece's BPE: it prefers the merge
whose result has the highest score, and text without a token becomes bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from shoal.model.checkpoint.gguf_file import SPECIAL_TOKEN_KEYS, GgufFile
from shoal.model.checkpoint.parts import TokenizerParts

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Types of tokens; normal, unused and byte-valued ones need nothing.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "▁"  # SentencePiece's letter for a space
_MAX_PIECE_LETTERS = 256  # every way to split a piece in two is looked up


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


_LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # a letter for each byte
_GPT2_LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False)  # the same, after a split as in GPT-2


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a byte-level tokenizer splits a text into pieces, within which it merges.

    Attributes:
        steps: pre-tokenizers, in order.
        normalizer: runs before the steps, such as a Unicode normal form.
        whole_tokens: whether a piece that is a token skips the merges.
        add_bos: whether a text begins with bos if the file does not say.
    """

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    whole_tokens: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_LLAMA3 = _Cut((_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _LETTERS), whole_tokens=True, add_bos=True)
_DEFAULT = "default"  # what llama.cpp uses for files that name none
_CUTS = {
    _DEFAULT: _Cut((*map(_split, (_PUNCTUATION, _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), _LETTERS)),
    "gpt-2": _Cut((_GPT2_LETTERS,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Cut((_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _LETTERS), normalizers.NFC()),
    "smollm": _Cut((pre_tokenizers.Digits(individual_digits=True), _GPT2_LETTERS)),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, with the type of each, and the ids of the special ones by name."""

    tokens: list[str]
    types: list[int]
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
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = file.metadata.get(f"{_PREFIX}model")
    if kind not in kinds:
        message = "missing" if kind is None else f"{kind!r} is not supported; supported: {', '.join(kinds)}"
        raise file.error(f"{_PREFIX}model", message)
    tokenizer = kinds[str(kind)](file, vocabulary)
    tokenizer.add_tokens(_added_tokens(vocabulary))
    return TokenizerParts(
        tokenizer=tokenizer,
        special_tokens={f"{name}_token": vocabulary.special(name) for name in vocabulary.special_ids},
        chat_templates=_chat_templates(file),
    )


def _read_vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = file.strings(f"{_PREFIX}tokens")
    types = [_NORMAL] * len(tokens)
    if f"{_PREFIX}token_type" in file.metadata:
        types = _one_each(file, "token_type", len(tokens))
    if len(set(tokens)) < len(tokens):
        raise file.error(f"{_PREFIX}tokens", "a token appears twice")
    special_ids = file.special_token_ids()
    for name, token_id in special_ids.items():
        if token_id >= len(tokens):
            raise file.error(_PREFIX + SPECIAL_TOKEN_KEYS[name], f"{token_id} is not one of {len(tokens)} tokens")
    return _Vocabulary(tokens, types, special_ids)


def _added_tokens(vocabulary: _Vocabulary) -> list[AddedToken]:
    """Tokens that are found in a text before it is split, and never merged."""
    return [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    name = file.metadata.get(f"{_PREFIX}pre", _DEFAULT)
    cut = _CUTS.get(str(name))
    if cut is None:
        raise file.error(f"{_PREFIX}pre", f"{name!r} is not supported; supported: {', '.join(_CUTS)}")
    merges = [tuple(merge.split(" ")) for merge in file.strings(f"{_PREFIX}merges")]
    tokenizer = _bpe(file, vocabulary, merges, add_bos=cut.add_bos, ignore_merges=cut.whole_tokens)
    tokenizer.normalizer = cut.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut.steps])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    """The form that Llama 2 has on Hugging Face: a space is put before a text, and after each special token."""
    merges, unknown = _merges_by_score(file, vocabulary), vocabulary.special("unk")
    tokenizer = _bpe(file, vocabulary, merges, add_bos=True, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    add_space = file.section(_PREFIX).flag("add_space_prefix", default=True)
    before = [normalizers.Prepend(_SPACE)] if add_space else []
    after = [decoders.Strip(" ", 1, 0)] if add_space else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _bpe(file: GgufFile, vocabulary: _Vocabulary, merges: list[Any], *, add_bos: bool, **options: Any) -> Tokenizer:
    """The tokenizer with its model, and with what it adds at both ends of a text."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(ids, merges, **options))
    except Exception as error:  # the library raises nothing narrower
        raise file.error(f"{_PREFIX}merges", f"not those of a tokenizer: {error}") from error
    fields = file.section(_PREFIX)
    defaults = {"bos": add_bos, "eos": False}
    added = [name for name, default in defaults.items() if fields.flag(f"add_{name}_token", default=default)]
    for name in added:
        if name not in vocabulary.special_ids:
            raise fields.error(SPECIAL_TOKEN_KEYS[name], f"missing, though a text is to begin or end with {name}")
    if added:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in ("bos", "$A", "eos") if part == "$A" or part in added],
            special_tokens=[
                {"id": name, "ids": [vocabulary.special_ids[name]], "tokens": [vocabulary.special(name)]}
                for name in added
            ],
        )
    return tokenizer


def _merges_by_score(file: GgufFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in descending order of the token's score.

    SentencePiece merges by the score of the result and has no list of merges; this list has the same effect.
    """
    scores = _one_each(file, "scores", len(vocabulary.tokens))
    pieces = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
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
