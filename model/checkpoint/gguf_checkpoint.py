"""A GGUF file as a checkpoint: its metadata under the names of a Hugging Face folder.

Only the architecture llama is supported; with experts it is Mixtral.  Keys that would change the numbers and
that no backend implements are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoal.model.checkpoint.gguf_file import BF16, F16, F32, ArrayValue, GgufFile, read_gguf
from shoal.model.checkpoint.parts import Fields, TokenizerParts, Weights

_ARCHITECTURE = "llama"
# The fields of config.json, by the keys that hold them.
_KEYS = {
    "architectures": "general.architecture",
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "num_local_experts": "llama.expert_count",
    "num_experts_per_tok": "llama.expert_used_count",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "llama.context_length",
    "sliding_window": "llama.attention.sliding_window",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "rope_parameters": "llama.rope.scaling.type",
    "rope_parameters.rope_theta": "llama.rope.freq_base",
    "rope_parameters.factor": "llama.rope.scaling.factor",
    "rope_parameters.factors": "tensor rope_freqs.weight",
}
# Keys, without `llama.`, that may change the numbers, with the values that do not.
_HARMLESS: dict[str, tuple[float, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # 1 is softmax
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_ROPE_FACTORS = "rope_freqs.weight"
_POOLING = {1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}  # 0 is none


class GgufCheckpoint:
    """See `CheckpointFormat`.

    Raises:
        CheckpointError: see `read_gguf`; or the file holds no model of a supported architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = read_gguf(path)
        self._own = self._file.section("llama.")
        _check_is_model(self._file)

    def config(self) -> Fields:
        file, own = self._file, self._own
        _refuse_unsupported(own)
        ids = file.special_token_ids()
        values: dict[str, Any] = {name: file.metadata.get(key) for name, key in _KEYS.items()}
        values |= {
            "architectures": ["MixtralForCausalLM" if self._num_experts else "LlamaForCausalLM"],
            "vocab_size": _vocab_size(file),
            "sliding_window": own.get("attention.sliding_window") or None,
            "rope_parameters": _rope(file, own),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "dtype": _dtype(file),
            "bos_token_id": ids.get("bos"),
            "eos_token_id": _end_ids(ids),
        }
        return Fields(file.path, values, names=_KEYS)

    def generation_config(self) -> Fields:
        values: dict[str, Any] = {name: self._file.metadata.get(key) for name, key in _SAMPLING.items()}
        values["eos_token_id"] = _end_ids(self._file.special_token_ids())
        return Fields(self._file.path, values, names=_KEYS | _SAMPLING)

    def pooling(self) -> Fields:
        kind = self._own.integer("pooling_type", minimum=0, default=0)
        return Fields(self._file.path, {"pooling_mode": _POOLING.get(kind, str(kind))} if kind else {})

    def tokenizer(self) -> TokenizerParts:
        # The engine process does not need the tokenizers package, which takes time to load.
        from shoal.model.checkpoint.gguf_tokenizer import read_gguf_tokenizer  # noqa: PLC0415

        return read_gguf_tokenizer(self._file)

    def weights(self) -> Weights:
        # The gguf package takes 0.1 s to load, and the API process does not need it.
        from shoal.model.checkpoint.gguf_weights import read_gguf_weights  # noqa: PLC0415

        num_heads = self._own.integer("attention.head_count", minimum=1)
        return read_gguf_weights(
            self._file,
            num_heads=num_heads,
            num_kv_heads=self._own.integer("attention.head_count_kv", minimum=1, default=num_heads),
            num_experts=self._num_experts,
        )

    @property
    def _num_experts(self) -> int:
        return self._own.integer("expert_count", minimum=0, default=0)


def _check_is_model(file: GgufFile) -> None:
    for key, supported, advice in (
        ("general.architecture", (_ARCHITECTURE,), f"supported: {_ARCHITECTURE}"),
        ("general.type", (None, "model"), "only a model can be served"),
        ("split.count", (None, 0, 1), "join the parts with `llama-gguf-split --merge`"),
    ):
        value = file.metadata.get(key)
        if value not in supported:
            raise file.error(key, "missing" if value is None else f"{value!r} is not supported; {advice}")


def _refuse_unsupported(own: Fields) -> None:
    for name, harmless in _HARMLESS.items():
        value = own.get(name)
        if value is not None and value not in harmless:
            raise own.error(name, f"{value!r} is not supported")
    num_heads = own.integer("attention.head_count", minimum=1)
    head_dim = own.integer(
        "attention.key_length", minimum=1, default=own.integer("embedding_length", minimum=1) // num_heads
    )
    for name in ("attention.value_length", "rope.dimension_count"):
        value = own.integer(name, minimum=0, default=head_dim)
        if value != head_dim:
            raise own.error(name, f"{value} differs from the {head_dim} of a head, which is not supported")


def _vocab_size(file: GgufFile) -> Any:
    """The size that the file states, else the number of its tokens."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    num_tokens = tokens.count if isinstance(tokens, ArrayValue) else None
    claimed = file.metadata.get("llama.vocab_size", num_tokens)
    if isinstance(claimed, int) and num_tokens is not None and num_tokens > claimed:
        raise file.error("tokenizer.ggml.tokens", f"{num_tokens} tokens exceed llama.vocab_size {claimed}")
    return claimed


def _rope(file: GgufFile, own: Fields) -> dict[str, Any]:
    """The `rope_parameters` of config.json.  llama.cpp's default type is linear; without a factor it does not scale."""
    theta = own.get("rope.freq_base")
    rope: dict[str, Any] = {"rope_theta": 10_000.0 if theta is None else theta}
    factor = own.get("rope.scaling.factor") or own.get("rope.scale_linear")
    kind = own.get("rope.scaling.type") or "linear"
    if kind == "none" or (kind == "linear" and not factor):
        rope["rope_type"] = "default"
    else:
        rope |= {"rope_type": kind, "factor": factor}
    if _ROPE_FACTORS in file.tensors:
        if rope["rope_type"] != "default":
            raise own.error("rope.scaling.type", f"{kind!r} beside the tensor {_ROPE_FACTORS} is not supported")
        rope |= {"rope_type": "factors", "factors": _rope_factors(file)}
    return rope


def _rope_factors(file: GgufFile) -> list[float]:
    """The divisor of each frequency; llama.cpp writes the scaling of Llama 3 in this form."""
    info = file.tensors[_ROPE_FACTORS]
    if info.type != F32 or len(info.shape) != 1 or info.start + 4 * info.shape[0] > len(file.data):
        raise file.error(f"tensor {_ROPE_FACTORS}", "expected one dimension of float32, within the file")
    factors: list[float] = np.frombuffer(file.data, "<f4", info.shape[0], info.start).tolist()
    return factors


def _dtype(file: GgufFile) -> str:
    """The number format of the matrices that are not float32; float32 if they are quantised or differ."""
    types = {info.type for info in file.tensors.values() if len(info.shape) > 1} - {F32}
    return "float16" if types == {F16} else "bfloat16" if types == {BF16} else "float32"


def _end_ids(ids: Mapping[str, int]) -> list[int]:
    """The tokens that end a generation: of the text, of a turn and of a message that calls a tool."""
    return list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
