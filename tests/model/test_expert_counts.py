"""The rows that each expert computes are counted as transformers routes them, and only while somebody wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.checkpoint.load import load_checkpoint
from tests.model.batches import Paged
from tests.model.oracles import random_record, run_chunks, run_whole
from tests.model.tiny import tiny_model

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")


@pytest.mark.parametrize("num_threads", [1, 3])
def test_counts_are_those_of_transformers(tmp_path: Path, num_threads: int) -> None:
    model = tiny_model("mixtral", num_local_experts=5, num_experts_per_tok=2)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 96, 40).tolist()
    with torch.no_grad():
        routed = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    chosen = [scores.topk(2, dim=-1).indices.flatten() for scores in routed]
    expected = [torch.bincount(experts, minlength=5).tolist() for experts in chosen]

    backend = NativeBackend(load_checkpoint(tmp_path), num_blocks=16, block_size=16, num_threads=num_threads)
    run_whole(backend, Paged(16, 16), tokens)
    counts = backend.count_experts(are_counted=True)
    assert counts is not None and not counts.any()
    run_chunks(backend, Paged(16, 16), {"a": tokens}, [{"a": 7}, {"a": 1}, {"a": 32}])
    assert counts.tolist() == expected
    assert backend.count_experts(are_counted=False) is None
    run_whole(backend, Paged(16, 16), tokens)
    assert counts.tolist() == expected, "nothing is counted any more"


def test_a_dense_model_has_nothing_to_count() -> None:
    backend = NativeBackend(random_record(), num_blocks=16, block_size=16, num_threads=1)
    assert backend.count_experts(are_counted=True) is None
