"""A GGUF file as a checkpoint: its metadata under the names of a Hugging Face folder.

`gguf_architectures.py` says which family an architecture of llama.cpp is.  Keys that would change the numbers and that
its row does not know are refused by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.model.checkpoint.families import FAMILIES, Family, Tensors
from shoal.model.checkpoint.gguf_architectures import ARCHITECTURES, Architecture, Key
from shoal.model.checkpoint.gguf_file import BF16, F16, F32, ArrayValue, GgufFile, read_gguf
from shoal.model.checkpoint.gguf_metadata import Metadata
from shoal.model.checkpoint.gguf_names import stored_names
from shoal.model.checkpoint.gguf_special import special_token_ids
from shoal.model.checkpoint.parts import Fields, TokenizerParts, Weights

# The fields of config.json of all architectures, and the keys that hold them.
_FIELDS: dict[str, Any] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_ROPE_FIELDS = {
    "rope_type": "rope.scaling.type",
    "rope_theta": "rope.freq_base",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "partial_rotary_factor": "rope.dimension_count",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "mscale": "rope.scaling.yarn_log_multiplier",
    "llama_4_scaling_beta": "attention.temperature_scale",
}
_LOCAL_ROPE_FIELDS = {"rope_theta": "rope.freq_base_swa", "partial_rotary_factor": "rope.dimension_count"}
# Fields that are computed of keys, and the key that an error about them names.
_COMPUTED_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "qk_nope_head_dim": "attention.key_length_mla",
    "v_head_dim": "attention.value_length_mla",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "scoring_func": "expert_gating_func",
    "rope_parameters": "rope.scaling.type",
    **{f"rope_parameters.{name}": key for name, key in _ROPE_FIELDS.items()},
    **{f"rope_parameters.full_attention.{name}": key for name, key in _ROPE_FIELDS.items()},
    **{f"rope_parameters.sliding_attention.{name}": key for name, key in _LOCAL_ROPE_FIELDS.items()},
}
_YARN = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_LONGROPE = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.attn_factor",
}
_FACTORS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_ROOT_KEYS = {
    "architectures": "general.architecture",
    "model_type": "general.architecture",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "rope_parameters.factors": f"tensor {_FACTORS}",
    "rope_parameters.long_factor": f"tensor {_LONG}",
    "rope_parameters.short_factor": f"tensor {_SHORT}",
}
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_POOLING = {1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}  # 0 is none


class GgufCheckpoint:
    """See `CheckpointFormat`.

    Raises:
        CheckpointError: see `read_gguf`; or the file holds no model of a supported architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = read_gguf(path)
        _check_is_model(self._file)
        self._architecture = str(self._file.metadata["general.architecture"])
        self._row = ARCHITECTURES[self._architecture]

    def config(self) -> Fields:
        file, row, metadata = self._file, self._row, Metadata(self._file)
        family = row.family if isinstance(row.family, str) else row.family(metadata)
        ids = special_token_ids(file)
        values: dict[str, Any] = {
            "model_type": family,
            "architectures": [self._architecture],
            "vocab_size": _vocab_size(file, metadata),
            "num_hidden_layers": metadata.num_layers,
            "num_key_value_heads": metadata.get("attention.head_count_kv") or metadata.get("attention.head_count"),
            "head_dim": metadata.head_dim,
            "rms_norm_eps": _eps(metadata),
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "dtype": _dtype(file),
            "bos_token_id": ids.get("bos"),
            "eos_token_id": _end_ids(ids),
        }
        sources = {**_FIELDS, **row.fields}
        values |= {name: metadata.resolve(source) for name, source in sources.items()}
        if FAMILIES[family].rotates:
            values["rope_parameters"] = _rope(metadata, row, FAMILIES[family])
        _check_widths(metadata, FAMILIES[family])
        metadata.refuse_unread()
        return Fields(file.path, values, names=self._own_keys(sources))

    def _own_keys(self, sources: Mapping[str, Any]) -> dict[str, str]:
        """The file's keys by the names of the fields that they give."""
        given = {name: source.key if isinstance(source, Key) else source for name, source in sources.items()}
        keys = _COMPUTED_FIELDS | {name: key for name, key in given.items() if isinstance(key, str)}
        return {name: f"{self._architecture}.{key}" for name, key in keys.items()} | _ROOT_KEYS

    def generation_config(self) -> Fields:
        values: dict[str, Any] = {name: self._file.metadata.get(key) for name, key in _SAMPLING.items()}
        values["eos_token_id"] = _end_ids(special_token_ids(self._file))
        return Fields(self._file.path, values, names=_ROOT_KEYS | _SAMPLING)

    def pooling(self) -> Fields:
        fields = self._file.section(f"{self._architecture}.")
        kind = fields.integer("pooling_type", minimum=0, default=0)
        return Fields(self._file.path, {"pooling_mode": _POOLING.get(kind, str(kind))} if kind else {})

    def tokenizer(self) -> TokenizerParts:
        # The engine process does not need the tokenizers package, which takes time to load.
        from shoal.model.checkpoint.gguf_tokenizer import read_gguf_tokenizer  # noqa: PLC0415

        return read_gguf_tokenizer(self._file)

    def own_tensors(self, tensors: Tensors) -> Tensors:
        return stored_names(self._file.tensors, self._row, tensors)

    def weights(self) -> Weights:
        # The gguf package takes 0.1 s to load, and the API process does not need it.
        from shoal.model.checkpoint.gguf_weights import read_gguf_weights  # noqa: PLC0415

        return read_gguf_weights(self._file, Metadata(self._file).num_layers)

    def outline(self) -> Weights:
        from shoal.model.checkpoint.gguf_weights import read_gguf_weights  # noqa: PLC0415

        return read_gguf_weights(self._file, Metadata(self._file).num_layers, outline=True)

    def holds(self) -> dict[str, tuple[int, int]]:
        from shoal.model.checkpoint.gguf_weights import stored_tensors  # noqa: PLC0415

        counts, sizes = Counter[str](), Counter[str]()
        for tensor in stored_tensors(self._file):
            counts[tensor.format.name] += 1
            sizes[tensor.format.name] += tensor.rows.nbytes
        return {name: (count, sizes[name]) for name, count in counts.most_common()}


def _check_is_model(file: GgufFile) -> None:
    named = f"docs/gguf.md lists the {len(ARCHITECTURES)} that are"
    for key, supported, advice in (
        ("general.architecture", tuple(ARCHITECTURES), named),
        ("general.type", (None, "model"), "only a model can be served"),
        ("split.count", (None, 0, 1), "join the parts with `llama-gguf-split --merge`"),
    ):
        value = file.metadata.get(key)
        if value not in supported:
            raise file.error(key, "missing" if value is None else f"{value!r} is not supported; {advice}")


def _eps(metadata: Metadata) -> Any:
    value = metadata.get("attention.layer_norm_rms_epsilon")
    return metadata.get("attention.layer_norm_epsilon") if value is None else value


def _check_widths(metadata: Metadata, family: Family) -> None:
    """Refuse values of another width than keys, but in latent attention."""
    width = metadata.get("attention.value_length")
    if not family.latent and width is not None and width != metadata.head_dim:
        message = f"{width} differs from the {metadata.head_dim} of a head, which is not supported"
        raise metadata.error("attention.value_length", message)


def _vocab_size(file: GgufFile, metadata: Metadata) -> Any:
    """The size that the file states, else the number of its tokens."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    num_tokens = tokens.count if isinstance(tokens, ArrayValue) else None
    claimed = metadata.get("vocab_size")
    if claimed is None:
        return num_tokens
    if isinstance(claimed, int) and num_tokens is not None and num_tokens > claimed:
        key = f"{metadata.architecture}.vocab_size"
        raise file.error("tokenizer.ggml.tokens", f"{num_tokens} tokens exceed {key} {claimed}")
    return claimed


def _rope(metadata: Metadata, row: Architecture, family: Family) -> dict[str, Any]:
    """The `rope_parameters` of config.json."""
    theta = metadata.number("rope.freq_base", default=10_000.0)
    local_theta = metadata.number("rope.freq_base_swa", default=row.local_theta or theta)
    common = {"partial_rotary_factor": 1.0 if family.latent else _turning_share(metadata)}
    rope = {**common, "rope_theta": theta, **_scaling(metadata, row)}
    if family.local_rope:
        return {"full_attention": rope, "sliding_attention": {**common, "rope_theta": local_theta}}
    if local_theta != theta:
        raise metadata.error("rope.freq_base_swa", f"{local_theta} is not supported for this architecture")
    return rope


def _turning_share(metadata: Metadata) -> float:
    """The share of a head that turns, rounded up, so that its product with the width is never below the number."""
    head_dim = metadata.head_dim
    return math.nextafter(metadata.integer("rope.dimension_count", default=head_dim) / head_dim, math.inf)


def _scaling(metadata: Metadata, row: Architecture) -> dict[str, Any]:
    """How the frequencies are scaled.  llama.cpp's default type is linear; without a factor it does not scale."""
    factor = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear")
    kind = metadata.get("rope.scaling.type") or "linear"
    if (long := metadata.vector(_LONG)) is not None:
        kinds = {"rope_type": "longrope", "long_factor": long, "short_factor": metadata.vector(_SHORT)}
        return kinds | {name: metadata.get(key) for name, key in _LONGROPE.items()}
    if kind == "none" or (kind == "linear" and not factor):
        if (factors := metadata.vector(_FACTORS)) is not None:
            return {"rope_type": "factors", "factors": factors}
        return {"rope_type": "default"}
    if _FACTORS in metadata.tensors:
        raise metadata.error("rope.scaling.type", f"{kind!r} beside the tensor {_FACTORS} is not supported")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {name: metadata.get(key) for name, key in _YARN.items()}
        scaling |= {name: metadata.resolve(source) for name, source in row.rope.items()}
    return scaling


def _dtype(file: GgufFile) -> str:
    """The number format of the matrices that are not float32; float32 if they are quantised or differ."""
    types = {info.type for info in file.tensors.values() if len(info.shape) > 1} - {F32}
    return "float16" if types == {F16} else "bfloat16" if types == {BF16} else "float32"


def _end_ids(ids: Mapping[str, int]) -> list[int]:
    """The tokens that end a generation: of the text, of a turn and of a message that calls a tool."""
    return list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
