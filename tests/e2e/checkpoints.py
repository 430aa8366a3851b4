"""Small checkpoints for servers that must start fast: one of random weights, one whose text is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|eos|>"]
CORPUS = [
    "the cat sat on the mat and the other cat did not",
    "größer 楽しい 楽しい naïve Übung",
    "def add(a, b): return a + b",
]
VOCAB_SIZE = 320
MAX_MODEL_LEN = 4096
CYCLE_MODEL_LEN = 16384  # so that a request can run for long enough to be watched on a busy machine
# All characters of the text differ in all their bytes, so that a model which knows only the last token can write it.
CYCLE = "a数é👍Z"
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


# What the config.json of a model of 7 billion parameters says.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float16",
}


def random_checkpoint(folder: Path) -> Path:
    """A Mixtral of random weights, larger than an initializer makes them, so that its tokens are far from a tie."""
    torch.manual_seed(5)
    model = MixtralForCausalLM(MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def cycle_checkpoint(folder: Path) -> Path:
    """A Llama that writes `CYCLE` over and over, a byte a token, from wherever in it the prompt ends.

    Its layers add nothing, and a token's successor has the token's own embedding in the output head.
    """
    folder.mkdir()
    tokenizer = _write_tokenizer(folder)
    token_ids = tokenizer.encode(CYCLE).ids
    assert len(token_ids) == len(set(token_ids)) == len(CYCLE.encode())
    torch.manual_seed(6)
    model: Any = LlamaForCausalLM(LlamaConfig(**_SHAPE | {"max_position_embeddings": CYCLE_MODEL_LEN}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                parameter.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.normal_()
        for token_id, successor in zip(token_ids, [*token_ids[1:], token_ids[0]], strict=True):
            head[successor] = embedding[token_id]
    model.save_pretrained(folder)
    return folder


def cycle_text(num_tokens: int) -> str:
    """What the cycle model says after a prompt that ends in "Z"."""
    data = CYCLE.encode()
    return (data * (num_tokens // len(data) + 1))[:num_tokens].decode(errors="replace")


def _write_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer
