"""The tokenizer of a Hugging Face folder.

`tokenizer.json` holds all of it.  Older folders have a vocabulary instead: `tokenizer.model` (SentencePiece), or
`vocab.json` with `merges.txt` (byte-level BPE, cut as the class in `tokenizer_config.json` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from shoal.model.checkpoint.hf_folder import TOKENIZER, read_json, read_text
from shoal.model.checkpoint.parts import Fields, TokenizerParts
from shoal.model.checkpoint.pre_tokenizers import CUTS
from shoal.model.checkpoint.sentencepiece_file import read_sentencepiece
from shoal.model.checkpoint.vocabulary import (
    Refusal,
    add_tokens,
    byte_level,
    sentencepiece_bpe,
    sentencepiece_unigram,
    surround,
)
from shoal.scheduler.errors import CheckpointError

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_SENTENCEPIECE = "tokenizer.model"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# The cut of each class of tokenizers that keeps its vocabulary in vocab.json.
_CUTS = {
    "GPT2Tokenizer": "gpt-2",
    "CodeGenTokenizer": "gpt-2",
    "GPTNeoXTokenizer": "olmo",
    "CohereTokenizer": "command-r",
    "Qwen2Tokenizer": "qwen2",
}
# Files of tokenizers that are not read, for the message.
_OTHERS = ("tekken.json", "sentencepiece.bpe.model", "spiece.model", "*.tiktoken", "vocab.txt")


def read_hf_tokenizer(folder: Path) -> TokenizerParts:
    """The tokenizer and the chat templates.

    Raises:
        CheckpointError: naming the file that is missing, malformed or unsupported.
    """
    config = _optional(folder, _CONFIG)
    special = _special_tokens(_optional(folder, _SPECIAL)) | _special_tokens(config)
    if not (folder / TOKENIZER).exists() and (folder / _SENTENCEPIECE).exists():
        tokenizer, special = _of_sentencepiece(folder, config, special)
    elif not (folder / TOKENIZER).exists() and (folder / _VOCABULARY).exists():
        tokenizer = _of_merges(folder, config, special)
    else:
        tokenizer = _of_json(folder)
    return TokenizerParts(tokenizer, special, _chat_templates(folder, config))


def _of_json(folder: Path) -> tokenizers.Tokenizer:
    path = folder / TOKENIZER
    if not path.exists():
        found = next((file.name for pattern in _OTHERS for file in folder.glob(pattern)), "")
        has = f"{found} alone is not supported; " if found else ""
        needed = f"{TOKENIZER}, {_SENTENCEPIECE}, or {_VOCABULARY} with {_MERGES} is needed"
        raise CheckpointError(f"{folder}: {has}{needed}", param=TOKENIZER)
    read_json(path)  # for its messages: the library's do not name the file
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer: {error}", param=path.name) from error


def _of_sentencepiece(
    folder: Path, config: Mapping[str, Any], special: Mapping[str, str]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer, and the special tokens with those that the file names."""
    model, fields = read_sentencepiece(folder / _SENTENCEPIECE), Fields(folder / _CONFIG, config)
    pieces = replace(
        model.pieces,
        prefix=fields.flag("add_prefix_space", default=model.pieces.prefix),
        prefix_once=not fields.flag("legacy", default=True),
    )
    make = {"bpe": sentencepiece_bpe, "unigram": sentencepiece_unigram}[model.algorithm]
    tokenizer = make(pieces, _refusal(folder / _SENTENCEPIECE))
    ids = {"unk_token": pieces.unknown_id, "bos_token": model.bos_id, "eos_token": model.eos_id}
    all_special = {name: pieces.tokens[i] for name, i in ids.items() if i is not None} | dict(special)
    add_tokens(tokenizer, pieces.tokens, pieces.kinds)
    _finish(folder, fields, tokenizer, all_special, add_bos=True)
    return tokenizer, all_special


def _of_merges(folder: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> tokenizers.Tokenizer:
    fields = Fields(folder / _CONFIG, config)
    name = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if name not in _CUTS:
        raise fields.error("tokenizer_class", f"{name!r} needs a {TOKENIZER}; without one: {', '.join(_CUTS)}")
    vocabulary, lines = read_json(folder / _VOCABULARY), read_text(folder / _MERGES).split("\n")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in vocabulary.values()):
        raise CheckpointError(f"{folder / _VOCABULARY}: expected the id of each token", param=_VOCABULARY)
    merges = [line for line in lines if line and not line.startswith("#version")]
    cut = CUTS[_CUTS[name]]
    tokenizer = byte_level(vocabulary, merges, cut, _refusal(folder / _MERGES))
    if fields.flag("add_prefix_space", default=False):
        if cut.patterns != CUTS["gpt-2"].patterns:
            raise fields.error("add_prefix_space", f"not supported with the class {name}")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    _finish(folder, fields, tokenizer, special, add_bos=False)
    return tokenizer


def _finish(
    folder: Path, fields: Fields, tokenizer: tokenizers.Tokenizer, special: Mapping[str, str], *, add_bos: bool
) -> None:
    """Add the tokens that the folder's files add to the vocabulary, and what stands at both ends of a text."""
    added = {i: AddedToken(text, normalized=False) for text, i in _optional(folder, _ADDED).items()}
    for i, entry in (fields.get("added_tokens_decoder") or {}).items():
        added[int(i)] = AddedToken(entry["content"], normalized=False, special=bool(entry.get("special")))
    for _, token in sorted(added.items()):
        tokenizer.add_tokens([token])
    for i, token in added.items():
        if (found := tokenizer.token_to_id(token.content)) != i:
            raise fields.error("added_tokens_decoder", f"{token.content!r} has the id {i}, and would get {found}")
    ids = {name: tokenizer.token_to_id(text) for name, text in special.items()}
    present = {name: (special[name], i) for name, i in ids.items() if i is not None}
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text, _ in present.values()])
    defaults = {"bos_token": add_bos, "eos_token": False}
    ends = [
        present.get(name) if fields.flag(f"add_{name}", default=default) else None for name, default in defaults.items()
    ]
    surround(tokenizer, *ends)


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).exists() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens of a JSON file by name; each is written as text or as an object with `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: from their own files, else from the config, which holds one or a list of named ones."""
    files = {path.stem: path for path in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / _TEMPLATE).exists():
        files["default"] = folder / _TEMPLATE
    if files:
        return {name: read_text(path) for name, path in files.items()}
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError) as error:
        message = f"{folder / _CONFIG}: chat_template: expected a template or a list of {{name, template}}"
        raise CheckpointError(message, param=_CONFIG) from error


def _refusal(path: Path) -> Refusal:
    return lambda name, message: CheckpointError(f"{path}: {name}: {message}", param=path.name)
