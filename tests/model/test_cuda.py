"""The torch backend on a GPU, where there is one: the CPU's numbers, and the specification's tokens."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch

from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.backends.torch_sampler import sample
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.step.batch import SamplingBatch
from shoal.model.step.sampling import sample_reference
from shoal.model.training.experts import route_through_experts
from tests.model.oracles import BUNDLED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_logits_are_those_of_the_cpu(dtype: Literal["float32", "bfloat16"], tolerance: float, paged: Any) -> None:
    record = load_checkpoint(BUNDLED)
    rng = np.random.default_rng(0)
    texts = {name: rng.integers(5, 4096, 200).tolist() for name in "abc"}
    logits = []
    for device, number in (("cpu", "float32"), ("cuda", dtype)):
        backend = TorchBackend(record, device=device, dtype=number, num_blocks=64, block_size=16)  # type: ignore[arg-type]
        pages = paged(64, 16)
        backend.forward(pages.batch([(name, text[:150], 0) for name, text in texts.items()]))
        logits.append(backend.forward(pages.batch([(name, text[150:], 150) for name, text in texts.items()])))
    assert np.linalg.norm(logits[1] - logits[0]) < tolerance * np.linalg.norm(logits[0])


def test_tokens_are_those_that_the_specification_chooses(sampling_batch: Callable[..., SamplingBatch]) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (400, 4096)).astype(np.float32)
    columns = np.array(
        [
            *((0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 0, 1.0), (1.0, 40, 1.0), (0.8, 0, 0.9), (1.3, 7, 0.5)),
            *((1.0, 0, 0.3), (0.9, 1, 1.0), (0.6, 100, 0.95), (2.0, 0, 1.0), (0.5, 0, 0.99), (0.0, 5, 0.5)),
        ]
    )
    temperature, top_k, top_p = np.resize(columns, (400, 3)).T
    each = np.arange(400)
    sampling = sampling_batch(400, temperature=temperature, top_k=top_k, top_p=top_p, seed=each, position=7 * each)
    found = sample(torch.from_numpy(logits).cuda(), sampling).token_ids
    np.testing.assert_array_equal(found, sample_reference(logits, sampling).token_ids)


def test_experts_of_the_trainer_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(1000, 64), torch.randn(8, 64, 64) / 8, torch.randn(8, 64, 32) / 8
    weights, chosen = torch.rand(1000, 2), torch.rand(1000, 8).topk(2).indices
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        inputs = [tensor.clone().to(device).requires_grad_() for tensor in (x, weights, gate_up, down)]
        output = route_through_experts(inputs[0].to(dtype), inputs[1], chosen.to(device), *inputs[2:])
        output.float().square().sum().backward()
        results.append([tensor.float().cpu() for tensor in (output, *(one.grad for one in inputs))])
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() < 0.02 * exact.norm()
