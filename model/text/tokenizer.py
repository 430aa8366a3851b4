"""Text to token ids and back, by the tokenizer of a checkpoint."""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint
from shoal.model.text.chat_template import ChatTemplate, texts_in
from shoal.model.text.middle import find_middle
from shoal.scheduler.errors import CheckpointError, InvalidRequestError

Value = TypeVar("Value")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Decoders under which a token's text depends only on whether it comes first; bytes also depend on their neighbours.
_LOCAL_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Tokenizer:
    """The tokenizer of a checkpoint.  Immutable and safe to share between threads.

    Two kinds of vocabulary are supported: byte-level (GPT-2's: every token is a run of bytes), and pieces of text with
    bytes to fall back on (SentencePiece's).  Any other decoder is refused, because its text cannot be streamed exactly.

    Attributes:
        is_byte_level: whether every token is a run of bytes and a text is their concatenation.
        max_token_chars: length of the longest token, which is as many characters at most.
        chat_template: of the checkpoint.
        apply_chat_template: see `ChatTemplate.render`.
        special_ids: of the tokens that `decode` skips unless told otherwise.
        bos_token_id, eos_token_id: as `tokenizer_config.json` names them, else None.
        middle: how the model is asked for what stands between two texts; None if it cannot be.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """Use `Tokenizer.load` for a checkpoint.

        Args:
            special_tokens: text of the special tokens by name, such as {"eos_token": "</s>"}.
            chat_templates: see `ChatTemplate`.

        Raises:
            CheckpointError: the decoder is not supported, or a chat template is not valid.
        """
        special_tokens = special_tokens or {}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        decoders = _decoders(tokenizer)
        self._tokenizer = tokenizer
        self._max_id = max(vocabulary.values(), default=-1)
        self.max_token_chars = max(map(len, vocabulary), default=1)
        self._special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_ids = frozenset(self._special.values())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # else it finds nothing
        self._byte_ids = frozenset(
            i for piece, i in vocabulary.items() if "ByteFallback" in decoders and _BYTE_TOKEN.fullmatch(piece)
        )
        self.is_byte_level = "ByteLevel" in decoders
        self._anchor = _anchor(tokenizer, vocabulary)
        self._token_bytes: dict[int, bytes] = {}
        self.chat_template = ChatTemplate(chat_templates or {}, special_tokens)
        self.apply_chat_template = self.chat_template.render
        self.bos_token_id = vocabulary.get(special_tokens.get("bos_token", ""))
        self.eos_token_id = vocabulary.get(special_tokens.get("eos_token", ""))
        self.middle = find_middle(vocabulary.get)

    @classmethod
    def load(cls, checkpoint: Path | CheckpointFormat) -> Tokenizer:
        """Read the tokenizer and the chat templates of a folder (see `hf_tokenizer.py`), or those of a GGUF file.

        Raises:
            CheckpointError: naming the file that is missing, malformed or unsupported.
        """
        opened = open_checkpoint(checkpoint)
        parts = opened.tokenizer()
        try:
            return cls(parts.tokenizer, special_tokens=parts.special_tokens, chat_templates=parts.chat_templates)
        except CheckpointError as error:
            raise CheckpointError(f"{opened.path}: {error.message}", param=error.param) from error

    def to_json(self) -> str:
        """The tokenizer as the `tokenizers` library writes it."""
        return self._tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[int, str]:
        """The special tokens by id."""
        return {token_id: text for text, token_id in self._special.items()}

    def has_vocabulary_of(self, other: Tokenizer) -> bool:
        """Whether each token id stands for the same token in both."""
        mine, theirs = (one._tokenizer.get_vocab(with_added_tokens=True) for one in (self, other))
        return mine == theirs

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text; special tokens written in it become themselves, and one at its beginning is not added.

        Other threads run meanwhile: the library gives the interpreter's lock away in calls for batches alone.

        Raises:
            InvalidRequestError: the text holds a lone surrogate, which has no UTF-8.
        """
        token_ids: list[int] = self._encoding(text, add_special_tokens=add_special_tokens).ids
        begin = self.begin_token_ids
        is_doubled = add_special_tokens and begin and token_ids[: 2 * len(begin)] == begin * 2
        return token_ids[len(begin) :] if is_doubled else token_ids

    def encode_start(self, text: str, max_tokens: int) -> list[int]:
        """`encode`, of so much of the text as `max_tokens` tokens hold, those around the text included."""
        encoding = self._encoding(text, add_special_tokens=False)
        encoding.truncate(max(max_tokens - self._tokenizer.num_special_tokens_to_add(False), 0))
        return self._tokenizer.post_process(encoding).ids[:max_tokens]

    def _encoding(self, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except TypeError as error:
            raise InvalidRequestError("the text holds a lone surrogate (U+D800 to U+DFFF)", param="prompt") from error

    def spellings(self, words: Iterable[str]) -> list[list[int]]:
        """The tokens of words as they stand at the beginning of a text, and behind a space."""
        return [self.encode(f"{space}{word}", add_special_tokens=False) for word in words for space in ("", " ")]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, parses_special: bool = False
    ) -> tuple[str, list[int]]:
        """A conversation as text, by the chat template, and as token ids.

        Args:
            parses_special: whether special tokens that a message spells become themselves.  Else they are text like
                any other, so that nobody can forge a turn of the conversation.

        Raises:
            InvalidRequestError: see `ChatTemplate.render` and `encode`.
        """
        masked, mask = (messages, "") if parses_special else self.mask_special(messages)
        return self.encode_rendered(self.apply_chat_template(masked, add_generation_prompt=add_generation_prompt), mask)

    @cached_property
    def begin_token_ids(self) -> list[int]:
        """What stands before each text that special tokens are added to."""
        first = self._tokenizer.encode("", add_special_tokens=True).ids[:1]
        return first if first == [self.bos_token_id] else []

    def mask_special(self, value: Value) -> tuple[Value, str]:
        """Texts in lists and objects in which two letters that nobody uses split each special token, and these letters.

        There are none if the texts spell no special token, and then they stay as they are.
        """
        spelt = "".join(texts_in(value))
        if not self._special_pattern.search(spelt):
            return value, ""
        mask = ""
        while mask in spelt:  # of so many pairs no text has more than a part
            mask = "".join(map(chr, random.choices(range(0xE000, 0xF900), k=2)))

        def split(text: str) -> str:
            return self._special_pattern.sub(lambda found: f"{found[0][0]}{mask}{found[0][1:]}", text)

        masked: Value = _with_texts(value, split)
        return masked, mask

    def encode_rendered(self, text: str, mask: str) -> tuple[str, list[int]]:
        """A text without the mask of `mask_special`, and its token ids: special tokens in it are the template's.

        Raises:
            InvalidRequestError: see `encode`.
        """
        if not mask:
            return text, self.encode(text, add_special_tokens=False)
        token_ids: list[int] = []
        start = 0
        for found in self._special_pattern.finditer(text):
            token_ids += self._encode_plain(text[start : found.start()].replace(mask, ""))
            token_ids.append(self._special[found[0]])
            start = found.end()
        token_ids += self._encode_plain(text[start:].replace(mask, ""))
        return text.replace(mask, ""), token_ids

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which special tokens are text."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens; unknown ids are skipped, bytes that are not UTF-8 become U+FFFD.

        Other threads run meanwhile, as in `encode`.
        """
        known = [i for i in token_ids if 0 <= i <= self._max_id]
        return self._tokenizer.decode_batch([known], skip_special_tokens=skip_special_tokens)[0]

    def decode_within(self, token_ids: Sequence[int]) -> str:
        """Text of tokens that follow others: a leading space is kept.  Special tokens are not skipped."""
        anchor_id, anchor_text = self._anchor
        return self.decode([anchor_id, *token_ids], skip_special_tokens=False)[len(anchor_text) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that the token stands for inside a text; alone they need not be UTF-8.

        Empty for an unknown id; a special token stands for its name.
        """
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._find_token_bytes(token_id)
        return found

    def _find_token_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id <= self._max_id else None
        if piece is None:
            return b""
        if self.is_byte_level:
            return _byte_level_bytes(piece)
        if token_id in self._byte_ids:
            return bytes.fromhex(piece[3:5])
        return self.decode_within([token_id]).encode()

    def is_fallback_byte(self, token_id: int) -> bool:
        """Whether the token is a byte that SentencePiece falls back on, whose text depends on its neighbours."""
        return token_id in self._byte_ids

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` skips the token unless told otherwise."""
        return token_id in self.special_ids

    def special_tokens_in(self, text: str) -> dict[str, int]:
        """The special tokens that a text spells, and their ids."""
        return {found: self._special[found] for found in self._special_pattern.findall(text) if found}


class IncrementalDetokenizer:
    """Turns a growing list of tokens into text, piece by piece: a piece is out once no later token can change it.

    All pieces together are `tokenizer.decode` of all tokens.  The work per token does not grow with the text.

    Args:
        shown: special tokens that are not skipped.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, shown: Collection[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = shown
        self._character = b""  # the first bytes of one that is incomplete
        self._pending_bytes: list[int] = []
        self._is_first = True

    def push(self, token_id: int) -> str:
        """Add a token; return the text that it completes, possibly empty.

        Byte-level: only an incomplete character is held back.  SentencePiece: a run of bytes is decoded as a whole or
        not at all, so it is held back until it ends.
        """
        token_bytes = self._tokenizer.token_bytes(token_id)
        if not token_bytes or (token_id in self._tokenizer.special_ids and self._skips(token_id)):
            return ""
        if self._tokenizer.is_byte_level:
            token_bytes = self._character + token_bytes
            text, num_decoded = codecs.utf_8_decode(token_bytes, "replace", False)
            self._character = token_bytes[num_decoded:]
            return text
        if self._tokenizer.is_fallback_byte(token_id):
            self._pending_bytes.append(token_id)
            return ""
        return self._pop_pending() + self._decode([token_id])

    def flush(self) -> str:
        """End the list of tokens; return the rest of the text."""
        return self._character.decode(errors="replace") + self._pop_pending()

    def _skips(self, special_id: int) -> bool:
        return self._skip_special_tokens and special_id not in self._shown

    def _pop_pending(self) -> str:
        token_ids, self._pending_bytes = self._pending_bytes, []
        return self._decode(token_ids) if token_ids else ""

    def _decode(self, token_ids: list[int]) -> str:
        if self._is_first:
            self._is_first = False
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)
        if len(token_ids) == 1 and not self._tokenizer.is_fallback_byte(token_ids[0]):
            return self._tokenizer.token_bytes(token_ids[0]).decode()
        return self._tokenizer.decode_within(token_ids)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _with_texts(inner, change) for name, inner in value.items()}
    return [_with_texts(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _byte_alphabet() -> dict[str, int]:
    """The bytes of GPT-2's letters: printable bytes are their own letters, the others have letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    """The bytes of a byte-level token; an added token may use letters outside the alphabet and is then plain text."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in piece])
    except KeyError:
        return piece.encode()


def _decoders(tokenizer: tokenizers.Tokenizer) -> set[str]:
    """The steps of the tokenizer's decoder, by the names of their types.

    Raises:
        CheckpointError: they belong to neither kind of vocabulary.
    """
    state = {"decoders": []} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    steps = state.get("decoders", [state])
    kinds = {step["type"] for step in steps}
    if kinds != {"ByteLevel"} and (not kinds <= _LOCAL_DECODERS or any(step.get("stop") for step in steps)):
        raise CheckpointError(
            f"the tokenizer's decoder {' + '.join(sorted(kinds))} is not supported; "
            f"supported: ByteLevel, or any of {', '.join(sorted(_LOCAL_DECODERS))}",
            param="tokenizer",
        )
    return kinds


def _anchor(tokenizer: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> tuple[int, str]:
    """A plain token and its text; tokens that are decoded after it are not the first.

    Raises:
        CheckpointError: the vocabulary holds none.
    """
    plain = [i for piece, i in vocabulary.items() if piece.isascii() and piece.isalnum()]
    if not plain:
        raise CheckpointError("the tokenizer's vocabulary holds no plain word", param="tokenizer")
    return min(plain), tokenizer.decode([min(plain)], skip_special_tokens=False)
