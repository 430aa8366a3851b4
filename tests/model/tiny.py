"""Tiny models of random weights, and what transformers says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

_TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A transformers model with random weights, larger than its initializer makes them so that logits differ."""
    torch.manual_seed(seed)
    if architecture == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**{**_TINY, **overrides}))
    else:
        moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(MixtralConfig(**{**_TINY, **moe, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


@torch.no_grad()
def expected_logits(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model(torch.tensor([tokens])).logits[0].float().numpy()
