"""Only the torch backend may load torch: a server on another backend saves seconds and hundreds of MB."""

import subprocess
import sys

import pytest

TORCH_FREE = [
    "model.batch",
    "model.backends.rope",
    "model.chat_template",
    "model.checkpoint",
    "model.config",
    "model.record",
    "model.safetensors_file",
    "model.sampling",
    "model.tokenizer",
]


@pytest.mark.parametrize("names", [TORCH_FREE], ids=["all"])
def test_torch_is_not_loaded(names: list[str]) -> None:
    code = f"import sys, {', '.join(names)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
