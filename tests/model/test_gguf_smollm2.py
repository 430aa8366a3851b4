"""SmolLM2-135M-Instruct, where the package that ships it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from shoal.model.architecture import RopeConfig
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.config import load_config, load_generation_defaults
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.gguf_file import read_gguf
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.numbers import in_float32
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import CheckpointError

# What llama.cpp makes of each text.
LLAMA_CPP: dict[str, list[int]] = {
    "Hello, world! It's 2024.": [19556, 28, 905, 17, 657, 506, 216, 34, 32, 34, 36, 30],
    "größer naïve café ﬁ ﬂ": [9861, 7466, 34878, 259, 15486, 46494, 37366, 40367, 216, 20755, 220],
    "数学は楽しい 😀": [18265, 18753, 116, 7365, 124, 177, 115, 138, 41414, 41679, 40303, 218],
    "१ ٣ Ⅷ ½ ² 1st": [9310, 117, 216, 164, 113, 216, 173, 223, 117, 216, 16738, 216, 19133, 216, 33, 302],
    "x<|endoftext|>y <|im_end|> z<|im_end|>": [104, 0, 105, 216, 2, 1892, 2],
    "a  b   c\n\n\n d\r\n e\t\tf": [81, 216, 278, 256, 265, 16506, 287, 2738, 297, 197, 197, 86],
    "$100.00 + 5% = ~€95": [20, 33, 32, 32, 30, 32, 32, 1232, 216, 37, 21, 446, 11417, 14195, 41, 37],
    "don't DON'T I'LL we'Re 's": [12420, 982, 422, 2154, 23, 68, 339, 23, 16421, 392, 23, 3733, 637, 99],
    "e\u0301 \u00a0nbsp\u2003em": [85, 151, 219, 216, 15442, 94, 32093, 321, 221, 391],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return resolve_checkpoint("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


@pytest.mark.parametrize("text", LLAMA_CPP)
def test_ids_equal_llama_cpp(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(text) == LLAMA_CPP[text]
    assert tokenizer.decode(LLAMA_CPP[text], skip_special_tokens=False) == text


def test_chat(tokenizer: Tokenizer) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_config(path: Path) -> None:
    config = load_config(path)
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (49152, 576, 30)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.tie_word_embeddings and config.layers[0].rope == RopeConfig(100_000, 64)
    assert load_generation_defaults(path).eos_token_ids == (2,)


def test_weights_are_those_of_the_library_and_know_the_capital_of_france(
    path: Path, tokenizer: Tokenizer, paged: Any
) -> None:
    record = load_checkpoint(path)
    data, tensors = np.memmap(path, np.uint8, "r"), read_gguf(path).tensors
    for name, array, kind, row_bytes in (
        ("token_embd", record.embedding, Type.Q8_0, 34 * 18),
        ("blk.7.attn_v", record.layers[7].attention.v_proj.weight, Type.Q4_1, 20 * 18),
    ):
        start = tensors[f"{name}.weight"].start
        rows = np.array(data[start : start + 99 * row_bytes]).reshape(99, row_bytes)
        np.testing.assert_array_equal(in_float32(array[:99]), gguf.dequantize(rows, kind))
    assert record.head.weight is record.embedding
    backend = TorchBackend(record, num_blocks=16, block_size=16)
    ids = tokenizer.encode("The capital of France is")
    logits = backend.forward(paged(16, 16).batch([("a", ids, 0)]))
    assert tokenizer.decode([int(logits[-1].argmax())]) == " Paris"
