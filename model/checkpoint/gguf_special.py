"""The special tokens of a GGUF file."""

from __future__ import annotations

from shoal.model.checkpoint.gguf_file import GgufFile

# The metadata keys, after `tokenizer.ggml.`, of the special tokens' ids.
SPECIAL_TOKEN_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
# What they are, for each kind of tokenizer, where the file names none.
_DEFAULT_IDS = {"llama": {"unk": 0, "bos": 1, "eos": 2}, "t5": {"pad": 0, "eos": 1, "unk": 2}}

# Tokens that end a turn where the file does not say which does, as llama.cpp knows them by their texts.
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
_HARMONY_END = "<|return|>"  # with which <|end|> ends a message, and the turn goes on (GPT-OSS)
_TOKENS = "tokenizer.ggml.tokens"


def special_token_ids(file: GgufFile) -> dict[str, int]:
    """Ids of the special tokens that the file has: bos, eos, unk, pad, eot (end of turn), eom (end of message).

    The end of turn is known by its text if no key holds its id.

    Raises:
        CheckpointError: naming the key that holds no id.
    """
    fields = file.section("tokenizer.ggml.")
    stated = {name: fields.optional_integer(key) for name, key in SPECIAL_TOKEN_KEYS.items()}
    ids = dict(_DEFAULT_IDS.get(str(fields.get("model")), {}))
    if stated["eot"] is None and (eot := _end_of_turn(file)) is not None:
        ids["eot"] = eot
    return ids | {name: token_id for name, token_id in stated.items() if token_id is not None}


def _end_of_turn(file: GgufFile) -> int | None:
    if _TOKENS not in file.metadata or file.index(_TOKENS, _HARMONY_END) is not None:
        return None
    found = (file.index(_TOKENS, text) for text in _ENDS_OF_TURN)
    return next((index for index in found if index is not None), None)
