"""What is added up of steps is the truth, on both backends, and only while somebody wants it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelRecord
from tests.model.batches import Paged, sampling_batch
from tests.model.oracles import random_record, run_chunks, run_whole
from tests.model.tiny import tiny_model

NATIVE = pytest.param(
    NativeBackend, marks=pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
)
Kind = type[NativeBackend | TorchBackend]


def create(kind: Kind, record: ModelRecord) -> NativeBackend | TorchBackend:
    return kind(record, num_blocks=16, block_size=16, num_threads=2)


@pytest.mark.parametrize("kind", [NATIVE, TorchBackend])
def test_rows_of_experts_are_those_of_transformers(tmp_path: Path, kind: Kind) -> None:
    model = tiny_model("mixtral", num_local_experts=5, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 96, 40).tolist()
    with torch.no_grad():
        routed = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    chosen = [scores.topk(2, dim=-1).indices.flatten() for scores in routed]
    expected = [torch.bincount(experts, minlength=5).tolist() for experts in chosen]

    backend = create(kind, load_checkpoint(tmp_path))
    run_whole(backend, Paged(16, 16), tokens)
    observed = backend.observe(is_observed=True)
    assert observed is not None and not observed.expert_rows.any()
    run_chunks(backend, Paged(16, 16), {"a": tokens}, [{"a": 7}, {"a": 1}, {"a": 32}])
    assert observed.expert_rows.tolist() == expected
    assert backend.observe(is_observed=False) is None
    run_whole(backend, Paged(16, 16), tokens)
    assert observed.expert_rows.tolist() == expected, "nothing is added any more"


@pytest.mark.parametrize("kind", [NATIVE, TorchBackend])
def test_the_time_of_sampling_is_a_part_of_the_step(kind: Kind) -> None:
    backend = create(kind, random_record())
    batch = Paged(16, 16).batch([("a", list(range(20)), 0)])
    sampling = sampling_batch(20, temperature=1.0, top_p=0.9)
    plain = backend.execute(batch, sampling).token_ids.copy()
    observed = backend.observe(is_observed=True)
    assert observed is not None and observed.expert_rows is None, "a dense model has no experts"
    began = time.perf_counter()
    assert backend.execute(batch, sampling).token_ids.tolist() == plain.tolist()
    assert 0 < observed.sample_seconds[0] < time.perf_counter() - began
    before = observed.sample_seconds[0]
    backend.forward(batch)
    assert observed.sample_seconds[0] == before, "nothing is chosen"
    backend.observe(is_observed=False)
    backend.execute(batch, sampling)
    assert observed.sample_seconds[0] == before
