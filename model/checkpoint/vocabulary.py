"""Makes tokenizers of vocabularies: byte-level ones with merges, and SentencePiece's with scores.

A `tokenizer.json` holds a whole tokenizer.  A GGUF file, a folder with `vocab.json` and `merges.txt`, and a
`tokenizer.model` hold a vocabulary, of which these functions make the tokenizer that Hugging Face would make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from shoal.model.checkpoint.pre_tokenizers import Cut
from shoal.scheduler.errors import CheckpointError

_SPACE = "▁"  # SentencePiece's letter for a space
_MAX_PIECE_LETTERS = 256  # every way to split a piece in two is looked up

Refusal = Callable[[str, str], CheckpointError]
"""Makes the error about a part of a vocabulary: "tokens", "merges", "scores"."""


class Kind(IntEnum):
    """The kinds of tokens of SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary of SentencePiece.

    Attributes:
        tokens, kinds, scores: one for each id.
        unknown_id: of the token for what has none.
        byte_fallback: whether text without a token becomes bytes.
        prefix: whether a space is put before a text, and after each special token.
        prefix_once: whether it is put there at the beginning alone (`legacy: false` of Hugging Face's Llama).
        squeezes: whether spaces at both ends are dropped, and several between words become one.
        charsmap: SentencePiece's normalization, compiled; empty for none.
    """

    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    unknown_id: int
    byte_fallback: bool = True
    prefix: bool = True
    prefix_once: bool = False
    squeezes: bool = False
    charsmap: bytes = b""


def byte_level(ids: Mapping[str, int], merges: Iterable[str], cut: Cut, refuse: Refusal) -> Tokenizer:
    """Byte-level BPE (GPT-2).

    Args:
        merges: pairs of tokens with a space between them, the first to be merged first.
    """
    tokenizer = _bpe(ids, [tuple(merge.split(" ")) for merge in merges], refuse, ignore_merges=cut.whole_tokens)
    tokenizer.normalizer = cut.normalizer()
    tokenizer.pre_tokenizer = cut.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(pieces: Pieces, refuse: Refusal) -> Tokenizer:
    """SentencePiece's BPE: it prefers the merge whose result has the highest score.

    The form that Llama 2 has on Hugging Face.
    """
    ids = {token: i for i, token in enumerate(pieces.tokens)}
    unknown = pieces.tokens[pieces.unknown_id]
    merges = _merges_by_score(pieces, refuse)
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": pieces.byte_fallback}
    return _with_spaces(_bpe(ids, merges, refuse, **options), pieces)


def sentencepiece_unigram(pieces: Pieces, refuse: Refusal) -> Tokenizer:
    """SentencePiece's unigram model: the tokens of a text are those with the greatest sum of scores."""
    try:
        model = models.Unigram(
            [*zip(pieces.tokens, pieces.scores, strict=True)], pieces.unknown_id, pieces.byte_fallback
        )
    except Exception as error:  # the library raises nothing narrower
        raise refuse("tokens", f"not those of a tokenizer: {error}") from error
    return _with_spaces(Tokenizer(model), pieces)


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[str], kinds: Iterable[int]) -> None:
    """Have those tokens found in a text before it is cut, and never merged, that are not normal ones."""
    tokenizer.add_tokens([
        AddedToken(token, normalized=False, special=kind != Kind.USER_DEFINED)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED) and token
    ])  # fmt: skip


def surround(tokenizer: Tokenizer, first: tuple[str, int] | None, last: tuple[str, int] | None) -> None:
    """Have a text begin and end with special tokens, each a text and its id."""
    added = {name: token for name, token in (("first", first), ("last", last)) if token}
    if added:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in ("first", "$A", "last") if part == "$A" or part in added],
            special_tokens=[{"id": name, "ids": [i], "tokens": [text]} for name, (text, i) in added.items()],
        )


def _bpe(ids: Mapping[str, int], merges: list[Any], refuse: Refusal, **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(dict(ids), merges, **options))
    except Exception as error:  # the library raises nothing narrower
        raise refuse("merges", f"not those of a tokenizer: {error}") from error


def _with_spaces(tokenizer: Tokenizer, pieces: Pieces) -> Tokenizer:
    """The tokenizer, with SentencePiece's treatment of spaces."""
    before: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        before.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.squeezes:
        before += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if pieces.prefix and pieces.prefix_once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    elif pieces.prefix:
        before.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if pieces.prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _merges_by_score(pieces: Pieces, refuse: Refusal) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in descending order of the token's score.

    SentencePiece merges by the score of the result and has no list of merges; this list has the same effect.
    """
    scores = {
        token: score
        for token, kind, score in zip(pieces.tokens, pieces.kinds, pieces.scores, strict=True)
        if kind not in (Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE)
    }
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        if len(piece) > _MAX_PIECE_LETTERS:
            message = f"a token of {len(piece)} letters; at most {_MAX_PIECE_LETTERS} are supported"
            raise refuse("tokens", message)
        # Of several pairs that make one piece, Hugging Face tries the one with the longest left part first.
        cuts = ((piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    return merges
