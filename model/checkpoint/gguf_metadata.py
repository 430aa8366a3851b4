"""The metadata of a GGUF file that describe the model, and which of them have been read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from shoal.model.checkpoint.gguf_file import F32, ArrayValue, GgufFile
from shoal.model.checkpoint.parts import Fields
from shoal.scheduler.errors import CheckpointError

# Keys that may change the numbers, with the values that do not; all others have to be read.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # 1 is softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
# Keys that never do, or that the shapes of tensors confirm.
_INFORMATION = frozenset(
    {
        "context_length",
        "feed_forward_length",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "pooling_type",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "tensor_data_layout",
        "vocab_size",
    }
)


class Metadata:
    """The metadata of the file's architecture, by keys without its name.

    Attributes:
        architecture: its name, which begins the keys.
        tensors: the names of the file's tensors.
    """

    def __init__(self, file: GgufFile) -> None:
        self.architecture = str(file.metadata.get("general.architecture"))
        self.tensors: Collection[str] = file.tensors.keys()
        self._file = file
        self._own = file.section(f"{self.architecture}.")
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, or None; of an array with a value for each layer, the one value that all have.

        Raises:
            CheckpointError: the layers differ.
        """
        self._read.add(key)
        value = self._own.get(key)
        if not isinstance(value, ArrayValue):
            return value
        values = set(self._file.numbers(self._own.prefix + key).tolist())
        if len(values) != 1:
            raise self.error(key, "differs from layer to layer, which is not supported")
        return values.pop()

    def integer(self, key: str, *, minimum: int = 1, default: int | None = None) -> int:
        """The integer.

        Raises:
            CheckpointError: it is missing, below the minimum or something else.
        """
        return self._fields(key, self.get(key)).integer(key, minimum=minimum, default=default)

    def number(self, key: str, default: float) -> float:
        """The number, of at least 0.

        Raises:
            CheckpointError: it is something else.
        """
        return self._fields(key, self.get(key)).number(key, minimum=0.0, default=default)

    def flags(self, key: str, count: int) -> list[bool] | None:
        """A flag for each of `count` layers; None where the file has none.

        The file has an array of them, or a number n: the flags of all layers but every n-th one are set.

        Raises:
            CheckpointError: it is something else.
        """
        self._read.add(key)
        value = self._own.get(key)
        if value is None:
            return None
        if not isinstance(value, ArrayValue):
            period = self.integer(key)
            return [(index + 1) % period != 0 for index in range(count)]
        flags = self._file.flags(self._own.prefix + key)
        if len(flags) != count:
            raise self.error(key, f"{len(flags)} flags for {count} layers")
        return flags

    @property
    def num_layers(self) -> int:
        """The layers that generate, without those that predict further tokens (multi-token prediction).

        Raises:
            CheckpointError: there cannot be as many.
        """
        count = self.integer("block_count") - self.integer("nextn_predict_layers", minimum=0, default=0)
        if not 0 < count <= len(self.tensors):
            message = f"{count} layers do not fit the {len(self.tensors)} tensors of the file"
            raise self.error("block_count", message)
        return count

    def vector(self, tensor: str) -> list[float] | None:
        """The numbers of a tensor of one dimension and float32; None where the file has none of that name.

        Raises:
            CheckpointError: it is another tensor.
        """
        file, info = self._file, self._file.tensors.get(tensor)
        if info is None:
            return None
        if info.type != F32 or len(info.shape) != 1 or info.start + 4 * info.shape[0] > len(file.data):
            raise file.error(f"tensor {tensor}", "expected one dimension of float32, within the file")
        numbers: list[float] = np.frombuffer(file.data, "<f4", info.shape[0], info.start).tolist()
        return numbers

    @property
    def head_dim(self) -> int:
        """The width of a head's query and key."""
        num_heads, hidden_size = self.integer("attention.head_count"), self.integer("embedding_length")
        if self.get("attention.key_length") is None and hidden_size % num_heads:
            raise self.error("embedding_length", f"{hidden_size} is not a multiple of {num_heads} heads")
        return self.integer("attention.key_length", default=hidden_size // num_heads)

    def resolve(self, source: Any) -> Any:
        """What a source of the table of architectures gives."""
        if callable(source):
            return source(self)
        return self.get(source) if isinstance(source, str) else source

    def error(self, key: str, message: str) -> CheckpointError:
        return self._own.error(key, message)

    def _fields(self, key: str, value: Any) -> Fields:
        return Fields(self._own.path, {key: value}, self._own.prefix)

    def refuse_unread(self) -> None:
        """Refuse what has not been read and may change the numbers.

        Raises:
            CheckpointError: naming the key.
        """
        for key, value in self._own.values.items():
            if key in self._read or key in _INFORMATION or value in _HARMLESS.get(key, ()):
                continue
            raise self.error(key, f"{value!r} is not supported for the architecture {self.architecture}"[:200])
