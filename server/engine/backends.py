"""Which backend computes: what the settings ask for, as far as this machine has it.

torch loads when its backend is wanted and not before: it takes seconds, and hundreds of megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from shoal.extras import install_command
from shoal.model.architecture import DTYPE_BYTES, ModelConfig
from shoal.model.backends.config import BackendConfig, CacheConfig
from shoal.model.backends.cores import num_cores
from shoal.model.backends.native_backend import SLOTS, NativeBackend
from shoal.model.backends.native_library import has_bfloat16, supported_isas
from shoal.model.backends.native_shape import check_cache, find_obstacle
from shoal.model.numbers import BLOCKS, Array, count_numbers
from shoal.model.record import ModelRecord
from shoal.model.step.batch import Backend
from shoal.scheduler.errors import ConfigError

DType = Literal["float32", "bfloat16"]

BUILD = "`python -m shoal.model.native.build`"
PARALLEL = ("tensor_parallel", "expert_parallel", "pipeline_parallel")


@dataclass(frozen=True)
class NativePlan:
    """The native backend: C++ on the CPU, in float32 but for what is kept or multiplied in fewer bits.

    Attributes:
        isa: the instruction set, one of `supported_isas()`.
        dtype: what linear layers multiply where weights are not quantised.
        warning: why that is not what the settings ask for; None if it is.
    """

    config: BackendConfig
    cache: CacheConfig
    isa: str
    kv_cache_dtype: Literal["float32", "float16", "int8"]
    dtype: DType = "float32"
    warning: str | None = None

    def create(self, record: ModelRecord, num_blocks: int, sibling: Backend | None = None) -> Backend:
        """A backend with its KV cache; it shares the threads of a sibling that this plan created, if one is given."""
        assert sibling is None or isinstance(sibling, NativeBackend)
        return NativeBackend(
            record,
            num_blocks=num_blocks,
            block_size=self.cache.block_size,
            num_threads=self.config.threads,
            kv_cache_dtype=self.kv_cache_dtype,
            dtype=self.dtype,
            quantization=self.config.quantization,
            pin_threads=self.config.pin_threads,
            isa=self.isa,
            sibling=sibling,
        )

    def describe(self, record: ModelRecord) -> str:
        """What a backend of this plan is with that model, for people."""
        config = self.config
        formats = record.formats if config.quantization == "none" else [config.quantization]
        weights = "float32" if formats == ["float32"] else f"{' and '.join(formats)} weights"
        if self.dtype == "bfloat16":
            weights = "bfloat16 weights and products"
        cache = "" if self.kv_cache_dtype == "float32" else f", {self.kv_cache_dtype} KV cache"
        num_threads = config.threads or num_cores()
        threads = f"{num_threads} thread{'' if num_threads == 1 else 's'}"
        return f"{weights}{cache}, native ({self.isa}, {threads})"

    def weight_bytes(self, record: ModelRecord) -> int:
        """What the weights take, nearly: vectors become float32, and matrices what they are multiplied as."""
        return sum(self._bytes_of(name, array) for name, _, _, array in record.tensors())

    def _bytes_of(self, name: str, array: Array) -> int:
        if array.ndim == 1:
            return 4 * array.size
        if self.dtype == "bfloat16":
            return 2 * count_numbers(array)
        if self.config.quantization == "none":
            return array.nbytes
        numbers, num_bytes = BLOCKS["Q4_1" if self.config.quantization == "int4" and name != "head" else "Q8_0"]
        return min(array.nbytes, count_numbers(array) * num_bytes // numbers)


@dataclass(frozen=True)
class TorchPlan:
    """The torch backend: runs on any device, and keeps the KV cache in the number format that it computes in.

    Attributes:
        warning: why torch serves although the settings do not ask for it; None if they do.
    """

    config: BackendConfig
    cache: CacheConfig
    kv_cache_dtype: DType
    warning: str | None

    def create(self, record: ModelRecord, num_blocks: int, sibling: Backend | None = None) -> Backend:
        """A backend with its KV cache; all backends share torch's threads."""
        from shoal.model.backends.torch_backend import TorchBackend  # noqa: PLC0415

        return TorchBackend(
            record,
            device=self.config.device,
            dtype=self.kv_cache_dtype,
            num_blocks=num_blocks,
            block_size=self.cache.block_size,
            num_threads=self.config.threads,
        )

    def describe(self, _record: ModelRecord) -> str:
        """What a backend of this plan is, for people."""
        return f"{self.kv_cache_dtype}, torch on {self.config.device}"

    def weight_bytes(self, record: ModelRecord) -> int:
        """What the weights take."""
        return DTYPE_BYTES[self.kv_cache_dtype] * record.num_parameters


def plan_backend(config: BackendConfig, cache: CacheConfig, model: ModelConfig) -> NativePlan | TorchPlan:
    """Choose the backend: if the settings leave it open, native wherever it can serve.

    Raises:
        ConfigError: the settings contradict each other, or ask for what this machine does not have.
    """
    if config.backend == "torch":
        return _plan_torch(config, cache, model, "backend is torch", None)
    obstacle = _native_obstacle(config, cache, model)
    if obstacle is None:
        return _plan_native(config, cache, model)
    reason, param = obstacle
    if config.backend == "native":
        raise ConfigError(reason, param=param)
    is_loss = config.device == "cpu"  # a user who asks for a GPU gets what they asked for
    warning = f"the torch backend serves, which is slower and takes more memory: {reason}"
    return _plan_torch(config, cache, model, reason, warning if is_loss else None)


def _plan_native(config: BackendConfig, cache: CacheConfig, model: ModelConfig) -> NativePlan:
    """
    Raises:
        ConfigError: products of two kinds are asked for, or a cache that the model cannot have.
    """
    dtype: DType = "float32"
    warning = None
    if config.dtype == "bfloat16":
        if config.quantization != "none":
            raise ConfigError(
                f"dtype bfloat16 does not go with quantization {config.quantization}, which multiplies integers",
                param="dtype",
            )
        if has_bfloat16():
            dtype = "bfloat16"
        else:
            warning = "float32 computes: dtype bfloat16 needs a processor with AVX512-BF16"
    kept = "float32" if cache.kv_cache_dtype == "auto" else cache.kv_cache_dtype
    check_cache(model, kept)
    return NativePlan(config, cache, supported_isas()[0], kept, dtype, warning)


def _native_obstacle(config: BackendConfig, cache: CacheConfig, model: ModelConfig) -> tuple[str, str] | None:
    """Why the native backend cannot serve, if so, and the setting that is at fault."""
    for name, asked, why in (
        ("device", config.device != "cpu", "which computes on the CPU"),
        *((name, getattr(config, name) > 1, "which computes in one process") for name in PARALLEL),
    ):
        if asked:
            return f"{name} {getattr(config, name)} is not for the native backend, {why}", name
    if cache.block_size % SLOTS:
        needed = f"which needs a multiple of {SLOTS}"
        return f"block_size {cache.block_size} is not for the native backend, {needed}", "block_size"
    if obstacle := find_obstacle(model):
        return obstacle[1], "backend"
    try:
        is_built = bool(supported_isas())
    except OSError as error:  # a library that was built elsewhere
        return f"backend native does not load: {error}; remove the library, then run {BUILD}", "backend"
    return None if is_built else (f"backend native is not built: install a C++ compiler, then run {BUILD}", "backend")


def _plan_torch(
    config: BackendConfig, cache: CacheConfig, model: ModelConfig, reason: str, warning: str | None
) -> TorchPlan:
    """Refuse what only the native backend has; `reason` says why that cannot serve.

    Raises:
        ConfigError: a setting needs the native backend, or torch is not installed.
    """
    only_native = (
        ("quantization", config.quantization, config.quantization != "none"),
        ("kv_cache_dtype", cache.kv_cache_dtype, cache.kv_cache_dtype in ("float16", "int8")),
        ("pin_threads", "true", bool(config.pin_threads)),
    )
    for param, value, is_asked in only_native:
        if is_asked:
            raise ConfigError(f"{param} {value} needs the native backend, but {reason}", param=param)
    dtype = _resolve_dtype(config, model)
    if cache.kv_cache_dtype not in ("auto", dtype):
        raise ConfigError(
            f"kv_cache_dtype {cache.kv_cache_dtype} is not for the torch backend when it computes in {dtype}",
            param="kv_cache_dtype",
        )
    if find_spec("torch") is None:
        needs = f"the torch backend needs torch, which is not installed: run `{install_command('torch')}`"
        raise ConfigError(f"{reason}; {needs}", param="backend")
    return TorchPlan(config, cache, dtype, warning)


def _resolve_dtype(config: BackendConfig, model: ModelConfig) -> DType:
    """The number format that torch computes in.  On the CPU 16-bit arithmetic is slower than 32-bit."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if config.device == "cpu" or model.dtype == "float32" else "bfloat16"
