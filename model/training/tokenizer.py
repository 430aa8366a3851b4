"""The tokenizer: byte-level BPE in which a newline is always a token of its own.

No piece of the pre-tokenizer spans a newline, looks beyond its own end, or joins letters to what follows them.  So
the tokens of a prompt that ends in a newline, or in an indentation, are the first tokens of every text that continues
it, and a completion starts from tokens that training has seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shoal.scheduler.errors import CheckpointError, ConfigError

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [END_OF_TEXT, *(f"<|{role}|>" for role in ROLES), END_OF_TURN]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A newline; a run of blanks; letters after at most one blank; one digit; signs after at most one blank; a blank.
_PIECES = r"\n|[^\S\n]{2,}| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges from `texts`; ConfigError if they are too few for `vocab_size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"the corpus gives {tokenizer.get_vocab_size()} tokens, vocab_size is {vocab_size}", param="vocab_size"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, special_id(tokenizer, END_OF_TEXT))]
    )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json; CheckpointError if it is missing or lacks a special token.

    It encodes plain text: the name of a special token in a text does not become that token.
    """
    tokenizer = Tokenizer.from_buffer(_read(path))
    for token in SPECIAL_TOKENS:
        special_id(tokenizer, token)
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; CheckpointError if the tokenizer has none."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise CheckpointError(f"the tokenizer has no token {token}", param="tokenizer.json")
    return token_id


def fingerprint(path: Path) -> str:
    """The SHA-256 of a tokenizer.json; token arrays and checkpoints carry it, so that no other is used with them.

    CheckpointError if the file is missing.
    """
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", param=path.name)
    return path.read_bytes()


def write_tokenizer_config(folder: Path, max_length: int) -> None:
    """Write the tokenizer_config.json that transformers, and Shoal, read beside a tokenizer.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
