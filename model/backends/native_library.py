"""Finds and loads the shared library of the native backend, and declares its interface: see model/native/shoal.h."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.architecture import Activation, NormKind, RouterScore
from shoal.model.step.sampling import SAMPLING_ROW

FOLDER = Path(__file__).resolve().parent.parent / "native"

# The instruction sets, best first; `shoal_best_isa` counts them from the last one.
ISAS = ("avx512", "avx2", "generic")

_INT32 = np.dtype(np.int32)

# As in shoal.h.
MAX_HEAD_DIM = 512
MAX_EXPERTS = 512
MAX_LATENT = 4096
NO_MEMORY = b"there is not enough memory"
TENSORS = (
    *("embedding", "head", "positions", "embedding_norm", "norm", "input_norm"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "sinks"),
    *("q_down", "q_down_norm", "kv_down", "kv_norm", "k_up", "v_up"),
    *("attention_output_norm", "feed_forward_norm", "feed_forward_output_norm"),
    *("router", "correction", "shared_gate", "gate_proj", "up_proj", "down_proj"),
)
# The names that fields of the architecture may have, in the order of shoal.h.
NORMS: tuple[NormKind, ...] = ("rms", "layer")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu")
ARITHMETICS = ("float32", "bfloat16", "int8", "int4")
KV_CACHES = ("float32", "float16", "int8")
HEAD_NORMS = ("none", "head", "whole")
SCORES: tuple[RouterScore, ...] = ("softmax", "sigmoid")


class Rope(Structure):
    _fields_ = [("dim", c_int32), ("cos", c_void_p), ("sin", c_void_p)]


class Mixture(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_experts", "num_experts_per_tok", "intermediate_size", "shared_size")),
        *((name, c_int32) for name in ("score", "renormalise")),
        ("scale", c_float),
        *((name, c_int32) for name in ("num_groups", "num_chosen_groups", "sums_top2", "share_on_input")),
    ]


class Layer(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rope", "temperatures", "window", "chunk", "cache_group", "cache_place")),
        ("intermediate_size", c_int32),
        ("mixture", Mixture),
    ]


class Latent(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rank", "rope_dim", "nope_dim", "value_dim", "query_rank")),
        ("norm_eps", c_float),
    ]


class Shape(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")),
        *((name, c_int32) for name in ("head_dim", "num_groups", "num_places", "tie_word_embeddings", "norm")),
        ("norm_eps", c_float),
        *((name, c_int32) for name in ("parallel", "norm_after_sum", "activation", "gated", "qk_norm", "qk_norm_kind")),
        ("qk_norm_eps", c_float),
        ("qk_norm_after_rope", c_int32),
        ("latent", Latent),
        *((name, c_float) for name in ("attention_scale", "attention_softcap", "logit_softcap")),
        *((name, c_float) for name in ("embedding_multiplier", "residual_multiplier", "logits_multiplier")),
        *((name, c_int32) for name in ("num_positions", "num_ropes", "num_temperatures")),
        ("layers", POINTER(Layer)),
        ("ropes", POINTER(Rope)),
        ("temperatures", c_void_p),
        ("alibi_slopes", c_void_p),
    ]


class Options(Structure):
    _fields_ = [
        ("num_blocks", c_int64),
        *((name, c_int32) for name in ("block_size", "num_threads", "pin_threads", "arithmetic", "kv_cache")),
    ]


class Batch(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("num_tokens", "num_seqs", "num_logits", "max_blocks")),
        *((name, c_void_p) for name in ("token_ids", "positions", "slot_mapping", "query_start_loc")),
        *((name, c_void_p) for name in ("context_lens", "block_tables", "logits_indices", "hidden", "inputs")),
    ]


class Draft(Structure):
    _fields_ = [
        ("num_layers", c_int32),
        ("num_seqs", c_int64),
        *((name, c_void_p) for name in ("rows", "starts", "ends", "num_wanted")),
        ("num_rows", c_int64),
        ("tokens_stride", c_int64),
        ("tokens", c_void_p),
        ("blocks_stride", c_int64),
        ("block_tables", c_void_p),
        ("token_ids", c_void_p),
    ]


def address(array: NDArray[Any], dtype: np.dtype[Any] = _INT32) -> int:
    """Where the numbers or records of an array begin, which must be of this type and without gaps."""
    assert array.dtype == dtype, "an array of another type"
    assert array.flags.c_contiguous, "an array with gaps"
    begin: int = array.ctypes.data
    return begin


def library_path(isa: str) -> Path:
    """The path of the library for an instruction set, which need not be built."""
    return FOLDER / f"libshoal-{isa}.so"


@cache
def supported_isas() -> tuple[str, ...]:
    """The instruction sets for which there is a library and which this machine has, best first.

    Raises:
        OSError: a library does not load, or was built from other sources.
    """
    built = [isa for isa in ISAS if library_path(isa).exists()]
    if not built:
        return ()
    num_supported = 1 + _load(library_path(built[-1])).shoal_best_isa()  # the plainest one loads anywhere
    return tuple(isa for isa in built if isa in ISAS[-num_supported:])


def load_library(isa: str | None = None) -> ctypes.CDLL:
    """The library for an instruction set, by default the best one.

    Raises:
        LookupError: there is no such library.
        OSError: it does not load, or was built from other sources.
    """
    supported = supported_isas()
    if not supported or (isa is not None and isa not in supported):
        raise LookupError(f"no native library for {isa or 'this machine'} was built in {FOLDER}")
    return _load(library_path(isa or supported[0]))


def has_bfloat16() -> bool:
    """Whether the best library multiplies bfloat16 by an instruction of its own; False where none loads."""
    try:
        isas = supported_isas()
    except OSError:
        return False
    return isas[:1] == ("avx512",) and bool(load_library().shoal_has_bfloat16())


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.shoal_best_isa.restype = c_int32
    library.shoal_has_bfloat16.restype = c_int32
    library.shoal_create.argtypes = [POINTER(Shape), POINTER(Options), c_void_p]
    library.shoal_create.restype = c_void_p
    library.shoal_destroy.argtypes = [c_void_p]
    library.shoal_destroy.restype = None
    library.shoal_load.argtypes = [c_void_p, c_int32, c_int32, c_int32, c_int32, c_void_p, c_int32]
    library.shoal_load.restype = c_char_p
    library.shoal_step.argtypes = [c_void_p, POINTER(Batch), c_int32, c_void_p, c_void_p, c_void_p]
    library.shoal_step.restype = c_char_p
    library.shoal_choose.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
    library.shoal_choose.restype = c_char_p
    library.shoal_draft.argtypes = [c_void_p, c_void_p, POINTER(Draft)]
    library.shoal_draft.restype = c_char_p
    library.shoal_observe.argtypes = [c_void_p, c_void_p, c_int32, c_void_p]
    library.shoal_observe.restype = None
    library.shoal_sample.restype = c_char_p
    library.shoal_sampling_row.restype = c_char_p
    if library.shoal_sampling_row().decode() != _fields_of_rows():
        raise OSError(f"{path} was built from other sources")
    return library


def _fields_of_rows() -> str:
    """SAMPLING_ROW as `shoal_sampling_row` describes it.  Offsets follow: both sides align fields alike."""
    kinds = [(name, SAMPLING_ROW[name]) for name in SAMPLING_ROW.names or ()]
    return "".join(f"{kind.base.name} {name}{list(kind.shape) or ''};" for name, kind in kinds)
