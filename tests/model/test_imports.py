"""Only the torch backend may load torch: a server on another backend saves seconds and hundreds of MB."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from shoal.model.backends.native_library import supported_isas
from tests.model.oracles import BUNDLED

TORCH_FREE = [
    "shoal.model.backends.native_backend",
    "shoal.model.backends.rope",
    "shoal.model.step.batch",
    "shoal.model.text.chat_template",
    "shoal.model.checkpoint.load",
    "shoal.model.checkpoint.format",
    "shoal.model.checkpoint.config",
    "shoal.model.checkpoint.gguf_weights",
    "shoal.model.step.executor",
    "shoal.model.record",
    "shoal.model.checkpoint.safetensors_file",
    "shoal.model.step.sampling",
    "shoal.model.text.tokenizer",
]


@pytest.mark.parametrize("names", [TORCH_FREE], ids=["all"])
def test_torch_is_not_loaded(names: list[str]) -> None:
    code = f"import sys, {', '.join(names)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
def test_torch_is_not_loaded_by_a_native_model() -> None:
    lines = [
        "import sys",
        "from pathlib import Path",
        "from shoal.model.backends.native_backend import NativeBackend",
        "from shoal.model.checkpoint.load import load_checkpoint",
        f"NativeBackend(load_checkpoint(Path({str(BUNDLED)!r})), num_blocks=4, block_size=16)",
        "assert 'torch' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_only_what_reads_weights_loads_the_gguf_package() -> None:
    """It costs the API process, which reads the config and the vocabulary, a tenth of a second."""
    names = "shoal.model.checkpoint.find, shoal.model.checkpoint.config, shoal.model.text.tokenizer"
    code = f"import sys, {names}; assert 'gguf' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_what_dequantises_loads_the_gguf_package(tmp_path: Path) -> None:
    """Formats that are kept as they are need none of it."""
    path = tmp_path / "kept.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output.weight", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    lines = [
        "import sys",
        "from pathlib import Path",
        "from shoal.model.checkpoint.gguf_file import read_gguf",
        "from shoal.model.checkpoint.gguf_weights import read_gguf_weights",
        f"assert list(read_gguf_weights(read_gguf(Path({str(path)!r})), 1).tensors) == ['output.weight']",
        "assert 'gguf' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_only_what_reads_a_tokenizer_loads_the_library_for_it() -> None:
    """The engine process reads weights alone."""
    code = "import sys, shoal.model.checkpoint.load; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("names", "not_needed"),
    [
        ("shoal.server.engine.process", "tokenizers jinja2 llguidance email asyncio"),
        ("shoal.server.cli, shoal.server.logs, shoal.server.start", "numpy pydantic prometheus_client http email"),
    ],
    ids=["engine", "before-the-engine"],
)
def test_a_start_loads_only_what_it_needs(names: str, not_needed: str) -> None:
    """What the engine's process, and the API process before it launches the engine, load is time to the first token."""
    code = f"import sys, {names}; print(*set({not_needed.split()}) & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == []
