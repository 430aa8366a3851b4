"""Which backend the engine process takes, and what it says when a setting cannot be had."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.extras import install_command
from shoal.model.architecture import LatentConfig, ModelConfig, bytes_per_block
from shoal.model.backends import native_library
from shoal.model.backends.native_library import supported_isas
from shoal.model.checkpoint.config import load_config
from shoal.scheduler.errors import ConfigError
from shoal.server import fingerprint
from shoal.server.engine import backends
from shoal.server.engine.backends import NativePlan, TorchPlan, plan_backend
from shoal.server.engine.memory import plan_kv_cache
from shoal.server.sources import load_settings

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "model/bundled/shoal-moe"


@pytest.fixture(autouse=True)
def no_file_and_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    built(monkeypatch, ["avx2", "generic"])


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_config(BUNDLED)


def built(monkeypatch: pytest.MonkeyPatch, isas: Sequence[str]) -> None:
    monkeypatch.setattr(backends, "supported_isas", lambda: tuple(isas))


def plan(model: ModelConfig, *args: str) -> NativePlan | TorchPlan:
    settings = load_settings(list(args))
    return plan_backend(settings.engine, settings.cache, model)


def refusal(model: ModelConfig, *args: str) -> tuple[str, str | None]:
    with pytest.raises(ConfigError) as caught:
        plan(model, *args)
    return caught.value.message, caught.value.param


@pytest.mark.parametrize(
    ("args", "kv_cache_dtype"),
    [
        ([], "float32"),
        (["--backend", "native"], "float32"),
        (["--dtype", "float32", "--block-size", "64"], "float32"),
        (["--kv-cache-dtype", "float32"], "float32"),
        (["--kv-cache-dtype", "float16"], "float16"),
        (["--kv-cache-dtype", "int8"], "int8"),
        (["--quantization", "int8", "--pin-threads"], "float32"),
        (["--quantization", "int4"], "float32"),
        (["--no-pin-threads"], "float32"),
    ],
    ids=" ".join,
)
def test_native_serves_where_it_can(model: ModelConfig, args: list[str], kv_cache_dtype: Any) -> None:
    asked = load_settings(args)
    assert plan(model, *args) == NativePlan(asked.engine, asked.cache, "avx2", kv_cache_dtype)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_native_multiplies_bfloat16_where_the_processor_does(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Elsewhere float32 computes, and a line says so.  The two have different tokens, and so different fingerprints."""
    found = []
    args = ["--backend", backend, "--dtype", "bfloat16"]
    asked = load_settings(args)
    for has_it in (True, False):
        monkeypatch.setattr(backends, "has_bfloat16", lambda has_it=has_it: has_it)
        monkeypatch.setattr(native_library, "has_bfloat16", lambda has_it=has_it: has_it)
        chosen = plan(model, *args)
        assert isinstance(chosen, NativePlan)
        found.append((chosen.dtype, chosen.kv_cache_dtype, chosen.warning, fingerprint.fingerprint(BUNDLED, asked)))
    (*with_it, first), (*without, second) = found
    assert with_it == ["bfloat16", "float32", None]
    assert without == ["float32", "float32", "float32 computes: dtype bfloat16 needs a processor with AVX512-BF16"]
    assert len({first, second, fingerprint.fingerprint(BUNDLED, load_settings([]))}) == 3


def test_a_model_beyond_the_native_backend_is_served_by_torch(model: ModelConfig) -> None:
    wide = replace(model, head_dim=1024)
    chosen = plan(wide)
    assert isinstance(chosen, TorchPlan)
    assert "head_dim 1024 exceeds the 512" in str(chosen.warning)
    message, param = refusal(wide, "--backend", "native")
    assert (param, "head_dim 1024" in message) == ("backend", True)


TORCH_SERVES = "the torch backend serves, which is slower and takes more memory: "
NEEDS_STEP = "block_size 8 is not for the native backend, which needs a multiple of 16"
NEEDS_CPU = "device cuda:1 is not for the native backend, which computes on the CPU"
NEEDS_BUILD = "backend native is not built: install a C++ compiler, then run `python -m shoal.model.native.build`"


@pytest.mark.parametrize(
    ("args", "dtype", "warning"),
    [
        (["--backend", "torch"], "float32", None),
        (["--backend", "torch", "--dtype", "bfloat16"], "bfloat16", None),
        (["--backend", "torch", "--kv-cache-dtype", "float32", "--no-pin-threads"], "float32", None),
        (["--device", "cuda"], "bfloat16", None),
        (["--block-size", "8"], "float32", TORCH_SERVES + NEEDS_STEP),
        (["--dtype", "bfloat16", "--block-size", "8"], "bfloat16", TORCH_SERVES + NEEDS_STEP),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_torch_serves_the_rest(model: ModelConfig, args: list[str], dtype: Any, warning: str | None) -> None:
    asked = load_settings(args)
    assert plan(model, *args) == TorchPlan(asked.engine, asked.cache, dtype, warning)


def test_torch_serves_where_nothing_is_built(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, [])
    asked = load_settings([])
    assert plan(model) == TorchPlan(asked.engine, asked.cache, "float32", TORCH_SERVES + NEEDS_BUILD)
    assert refusal(model, "--backend", "native") == (NEEDS_BUILD, "backend")
    assert refusal(model, "--quantization", "int8") == (
        f"quantization int8 needs the native backend, but {NEEDS_BUILD}",
        "quantization",
    )


def test_torch_serves_where_the_library_is_of_another_machine(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "libshoal-generic.so").write_bytes(b"\x7fELF of another kind")
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    monkeypatch.setattr(backends, "supported_isas", native_library.supported_isas.__wrapped__)
    chosen = plan(model)
    assert isinstance(chosen, TorchPlan)
    assert chosen.warning is not None
    assert chosen.warning.startswith(f"{TORCH_SERVES}backend native does not load: {tmp_path}/libshoal-generic.so: ")
    assert refusal(model, "--backend", "native")[1] == "backend"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--backend", "torch"], "backend is torch"),
        (["--device", "cuda:1"], NEEDS_CPU),
        ([], NEEDS_BUILD),
    ],
    ids=["asked for", "for a GPU", "in place of native"],
)
def test_a_torch_that_is_not_installed(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, args: list[str], reason: str
) -> None:
    built(monkeypatch, [])
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    needs = f"the torch backend needs torch, which is not installed: run `{install_command('torch')}`"
    assert refusal(model, *args) == (f"{reason}; {needs}", "backend")


@pytest.mark.parametrize("checkpoint_dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu_the_checkpoint_decides(model: ModelConfig, checkpoint_dtype: str) -> None:
    model = replace(model, dtype=checkpoint_dtype)  # type: ignore[arg-type]  # one of its choices
    assert plan(model, "--device", "cuda").kv_cache_dtype == (
        "float32" if checkpoint_dtype == "float32" else "bfloat16"
    )
    assert plan(model, "--backend", "torch").kv_cache_dtype == "float32"


@pytest.mark.parametrize(
    ("args", "message", "param"),
    [
        (["--backend", "native", "--device", "cuda:1"], NEEDS_CPU, "device"),
        (
            ["--dtype", "bfloat16", "--quantization", "int8"],
            "dtype bfloat16 does not go with quantization int8, which multiplies integers",
            "dtype",
        ),
        (["--backend", "native", "--block-size", "8"], NEEDS_STEP, "block_size"),
        (
            ["--backend", "torch", "--quantization", "int8"],
            "quantization int8 needs the native backend, but backend is torch",
            "quantization",
        ),
        (
            ["--backend", "torch", "--kv-cache-dtype", "float16"],
            "kv_cache_dtype float16 needs the native backend, but backend is torch",
            "kv_cache_dtype",
        ),
        (
            ["--backend", "torch", "--kv-cache-dtype", "int8"],
            "kv_cache_dtype int8 needs the native backend, but backend is torch",
            "kv_cache_dtype",
        ),
        (
            ["--backend", "torch", "--pin-threads"],
            "pin_threads true needs the native backend, but backend is torch",
            "pin_threads",
        ),
        (
            ["--device", "cuda:1", "--quantization", "int4"],
            f"quantization int4 needs the native backend, but {NEEDS_CPU}",
            "quantization",
        ),
        (
            ["--backend", "torch", "--dtype", "bfloat16", "--kv-cache-dtype", "float32"],
            "kv_cache_dtype float32 is not for the torch backend when it computes in bfloat16",
            "kv_cache_dtype",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_contradicts_itself_is_refused(model: ModelConfig, args: list[str], message: str, param: str) -> None:
    assert refusal(model, *args) == (message, param)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_latent_attention_has_no_cache_of_bytes(model: ModelConfig, backend: str) -> None:
    latent = replace(model, latent=LatentConfig(rank=8, rope_dim=4, nope_dim=8, value_dim=8))
    asked = ("--backend", backend, "--kv-cache-dtype")
    assert plan(latent, *asked, "float16").kv_cache_dtype == "float16"
    assert refusal(latent, *asked, "int8") == ("kv_cache_dtype int8 is not for latent attention", "kv_cache_dtype")


def test_a_cache_of_fewer_bits_holds_more(model: ModelConfig) -> None:
    """The plan counts in the cache's own number format, with the scales of bytes."""
    sizes = {}
    for dtype in ("float32", "float16", "int8"):
        args = ["--kv-cache-dtype", dtype, "--memory-mib", "8"]
        chosen, asked = plan(model, *args), load_settings(args)
        num_blocks, num_bytes = plan_kv_cache(asked, model, dtype=chosen.kv_cache_dtype, max_model_len=64, free=2**30)
        assert num_bytes == num_blocks * bytes_per_block(model, dtype, asked.cache.block_size) <= 8 * 2**20
        sizes[dtype] = num_blocks
    assert sizes["float16"] == 2 * sizes["float32"]
    assert sizes["int8"] == pytest.approx(4 * sizes["float32"] / (1 + 4 / model.head_dim), abs=4)


BUILD_ENGINE = """
import sys
from shoal.server.engine.build import build_engine
from shoal.server.sources import load_settings
print(build_engine(load_settings(sys.argv[1:])).ready.backend)
print(*sorted({"torch", "transformers", "gguf"} & sys.modules.keys()))
"""


@pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
@pytest.mark.parametrize(
    ("args", "description"),
    [
        ([], "bfloat16 weights, native ({isa}, 1 thread)"),
        (["--kv-cache-dtype", "float16"], "bfloat16 weights, float16 KV cache, native ({isa}, 1 thread)"),
        (["--quantization", "int8", "--threads", "2"], "int8 weights, native ({isa}, 2 threads)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_native_engine_loads_no_torch(args: list[str], description: str) -> None:
    """In a fresh process, with the bundled model."""
    limits = ["--num-blocks", "16", "--max-model-len", "64", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", BUILD_ENGINE, *limits, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [description.format(isa=supported_isas()[0]), ""]
