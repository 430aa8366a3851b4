"""A row of the torch backend's products has the same bits, whatever rows and sequences it is computed beside.

MKL chooses its kernels by the processor: the last test makes it choose those for AMD processors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.model.backends.torch_activations import activation
from shoal.model.backends.torch_attention import weighted_sum
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.backends.torch_layers import LinearWeights, linear
from tests.model.oracles import random_record, random_steps, run_chunks, sequences

HEAD_DIMS = (4, 16, 20, 24, 64)
# The number of products in a batch, and of rows in each of them.
BATCHES = list(product((1, 2, 7), (4, 8, 20, 64)))
# Makes MKL, which is a part of torch, treat this processor as a Zen of AMD.
AMD = "int mkl_serv_intel_cpu_true(void) { return 0; } int mkl_serv_cpuiszen(void) { return 1; }"


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest, one_thread: None) -> Iterator[int]:
    torch.set_num_threads(request.param)
    torch.manual_seed(0)
    yield request.param


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("context", [32, 160])
def test_weighted_sum(head_dim: int, context: int, threads: int) -> None:
    rows, own_values = torch.rand(1, 4, context), torch.randn(1, context, head_dim)
    expected = weighted_sum(rows, own_values)[0]
    for batch_size, n in BATCHES:
        shares, values = torch.rand(batch_size, n, context), torch.randn(batch_size, context, head_dim)
        values[-1] = own_values[0]
        for row in {0, n // 8 * 4, n - 4}:
            shares[-1, row : row + 4] = rows[0]
            assert torch.equal(weighted_sum(shares, values)[-1, row : row + 4], expected), (batch_size, n, row)


@pytest.mark.parametrize("out", [1, 5, 6, 8, 12, 16, 20, 24, 72])
@pytest.mark.parametrize("width", [20, 72])
def test_linear(out: int, width: int, threads: int) -> None:
    own, weight = torch.randn(width), torch.randn(out, width)
    weights = LinearWeights(weight)
    expected = linear(own[None], weights)[0]
    for n in (2, 5, 12, 20, 100):
        x = torch.randn(n, width)
        for row in {0, n // 2, n - 1}:
            x[row] = own
            assert torch.equal(linear(x, weights)[row], expected), (n, row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        *({"head_dim": head_dim, "hidden_size": 40} for head_dim in HEAD_DIMS),
        {"hidden_size": 72, "num_heads": 3, "num_kv_heads": 1, "head_dim": 24},
        {"hidden_size": 72, "num_heads": 7, "num_kv_heads": 1, "head_dim": 10, "vocab_size": 1003},
        {"num_experts": 3, "num_experts_per_tok": 1, "intermediate_size": 37, "hidden_size": 70},
        {"num_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 20},
        {"num_experts": 16, "num_experts_per_tok": 4},
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
def test_chunks_and_neighbours(shape: dict[str, Any], dtype: Any, threads: int, paged: Any) -> None:
    """Alone and whole, or in any chunks beside others, whose contexts are as short or much longer."""
    record = random_record(num_layers=1, tie_word_embeddings=False, **shape)
    backend = TorchBackend(record, dtype=dtype, num_blocks=512, block_size=4)
    texts = sequences(7, 12, 9, 15, 3, 150)
    alone = {name: run_chunks(backend, paged(512, 4), {name: t}, [{name: len(t)}])[name] for name, t in texts.items()}
    short = {name: tokens for name, tokens in texts.items() if len(tokens) < 16}
    for others, seed in product((texts, short), range(2)):
        together = run_chunks(backend, paged(512, 4), others, random_steps(seed, others))
        for name in others:
            np.testing.assert_array_equal(together[name], alone[name])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "clamped_silu"])
@pytest.mark.parametrize("width", [37, 1000])
def test_activations(kind: Any, width: int, threads: int) -> None:
    """Also of a row of which one thread computes a part, and another one the rest."""
    own, activate = torch.randn(2 * width), activation(kind, gated=True)
    expected = activate(own[None])[0]
    for n in (3, 303, 1001):
        x = torch.randn(n, 2 * width)
        for row in {0, n // 2, n - 1}:
            x[row] = own
            assert torch.equal(activate(x)[row], expected), (n, row)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a library is preloaded as the linker of Linux does")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("threads", ["one-thread", pytest.param("thread", marks=pytest.mark.long, id="all")])
def test_on_the_kernels_of_amd(threads: str, tmp_path: Path) -> None:
    library = tmp_path / "amd.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=AMD, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", f"not kernels_of_amd and {threads}", __file__],
        env=os.environ | {"LD_PRELOAD": str(library)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
