"""Whole texts through scheduler, executor and each backend, against transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.step.executor import ModelExecutor
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import RequestOutput, SamplingParams, SchedulerStats, SchedulingParams
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.request import Request
from shoal.scheduler.scheduler import Scheduler
from tests.fakes import named_policy
from tests.model.oracles import SHAPES

# Backend, its options, and the size of its blocks, to which prompts and limits are in proportion.
BACKENDS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "torch": (TorchBackend, {}, 4),
    "native": (NativeBackend, {"num_threads": 2}, 16),
    "native-int8": (NativeBackend, {"num_threads": 2, "quantization": "int8", "kv_cache_dtype": "int8"}, 16),
}
NUM_BLOCKS = 16  # so few that some must wait for others
LIMITS = {"max_model_len": 20, "max_num_batched_tokens": 6, "max_chunk_tokens": 2}  # in blocks
MAX_NUM_SEQS = 5

needs_native = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
NATIVE, NATIVE_INT8 = (pytest.param(name, marks=needs_native) for name in ("native", "native-int8"))


def make_requests(block_size: int, temperature: float) -> list[Request]:
    """Prompts of up to 10 blocks, two of which begin alike, and 3 to 24 tokens to generate."""
    rng = np.random.default_rng(5)
    lengths = [1, *(int(blocks * block_size) for blocks in (10, 0.75, 4, 2, 7, 3, 8))]
    prompts = [rng.integers(3, 96, length).tolist() for length in lengths]
    prompts.insert(2, [*prompts[1][: 5 * block_size + 1], 7, 7])
    params = [
        SamplingParams(
            max_tokens=3 + 7 * i % 22,
            seed=i,
            num_logprobs=2,
            logprob_token_ids=(95, i) if i % 2 else None,
            stop_token_ids=frozenset([2]),
            temperature=temperature,
        )
        for i in range(len(prompts))
    ]
    return [Request(str(i), prompts[i], params[i], arrival_time=0.0) for i in range(len(prompts))]


def run(
    folder: Path,
    backend: str,
    requests: Sequence[Request],
    *,
    num_blocks: int,
    policy: str = "fcfs",
    fair_lead: float = 256.0,
    **limits: int,
) -> tuple[SchedulerStats, list[RequestOutput]]:
    """Let a new request join every second step, whatever the others do; check the blocks after each step."""
    create, options, block_size = BACKENDS[backend]
    in_tokens = {name: blocks * block_size for name, blocks in LIMITS.items()}
    limits = {"max_num_seqs": MAX_NUM_SEQS, **in_tokens, **limits}
    config = SchedulerConfig(num_blocks=num_blocks, block_size=block_size, **limits)
    executor = ModelExecutor(
        create(load_checkpoint(folder), num_blocks=num_blocks, block_size=block_size, **options),
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        block_size=block_size,
    )
    news: list[RequestOutput] = []
    to_come = list(requests)
    step = 0
    core = EngineCore(
        Scheduler(config, named_policy(policy, config, {"fair_lead": fair_lead})),
        executor,
        lambda: float(step),
    )
    while to_come or core.scheduler.num_unfinished:
        if to_come and step % 2 == 0:
            core.scheduler.add(to_come.pop(0))
        news += core.step()
        check_invariants(core.scheduler)
        step += 1
    return core.scheduler.stats(), news


@pytest.mark.parametrize("backend", ["torch", NATIVE])
@pytest.mark.parametrize(
    "shape", ["llama", "mixtral", *(pytest.param(shape, marks=pytest.mark.long) for shape in SHAPES if "-" in shape)]
)
def test_greedy_texts_are_those_of_transformers(shape: str, backend: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(shape.partition("-")[0], **SHAPES[shape])
    requests = make_requests(BACKENDS[backend][-1], 0.0)
    stats, news = run(folder, backend, requests, num_blocks=NUM_BLOCKS)
    assert stats.num_preemptions > 0, "the pool was meant to be too small"
    assert stats.num_prefix_hits > 0, "two prompts were meant to begin alike"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for request in requests:
        prompt = torch.tensor([request.token_ids[: request.num_prompt_tokens]])
        settings = GenerationConfig(max_new_tokens=request.params.max_tokens, do_sample=False, pad_token_id=0)
        settings.update(return_dict_in_generate=True, output_logits=True)
        expected: Any = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        assert list(request.token_ids) == expected.sequences[0].tolist()
        entries = [entry for one in news if one.request_id == request.request_id for entry in one.logprobs or ()]
        logprobs = torch.stack(expected.logits)[:, 0].log_softmax(-1).numpy()
        top = np.argsort(-logprobs)[:, :2]
        named = np.broadcast_to(request.params.logprob_token_ids or [0, 0], top.shape)
        wanted = named if request.params.logprob_token_ids else top
        assert [entry.top_token_ids for entry in entries] == wanted.tolist()
        found = np.array([entry.top_logprobs for entry in entries])
        np.testing.assert_allclose(found, np.take_along_axis(logprobs, wanted, axis=1), atol=1e-3)


@pytest.mark.parametrize("backend", ["torch", NATIVE, NATIVE_INT8])
@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_texts_and_logprobs_do_not_depend_on_batch_chunks_cache_or_preemption(
    shape: str, backend: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """To the bit: the promise that every backend keeps on the CPU."""
    folder = tiny_checkpoint(shape)
    block_size = BACKENDS[backend][-1]

    def everything(requests: list[Request], **how: int) -> tuple[SchedulerStats, dict[str, list[object]]]:
        stats, news = run(folder, backend, requests, **how)
        found: dict[str, list[object]] = {request.request_id: [] for request in requests}
        for one in news:
            found[one.request_id] += [*zip(one.token_ids, one.logprobs, strict=True)]
        return stats, found

    stats, together = everything(make_requests(block_size, 1.0), num_blocks=NUM_BLOCKS)
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    limit = LIMITS["max_model_len"] * block_size
    _, whole = everything(
        make_requests(block_size, 1.0), num_blocks=400, max_chunk_tokens=limit, max_num_batched_tokens=limit
    )
    alone = {}
    for request in make_requests(block_size, 1.0):
        alone |= everything([request], num_blocks=400, max_num_seqs=1)[1]
    assert together == whole == alone


@pytest.mark.parametrize("backend", ["torch", NATIVE])
def test_texts_do_not_depend_on_the_policy(backend: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """To the bit, with few blocks, few rows and every reason to preempt; padding rows included."""
    folder = tiny_checkpoint("llama")
    found: dict[str, dict[str, list[object]]] = {}
    for policy in POLICIES:
        requests = make_requests(BACKENDS[backend][-1], 1.0)
        for index, request in enumerate(requests):
            slo = 9000.0 / (index + 1)
            request.scheduling = SchedulingParams(client=str(index % 3), priority=-index, ttft_slo_ms=slo)
        how = {"policy": policy, "fair_lead": 4.0 * BACKENDS[backend][-1]}  # so that fair pauses some
        stats, news = run(folder, backend, requests, num_blocks=NUM_BLOCKS, max_num_seqs=3, **how)
        assert stats.num_preemptions > 0, policy
        found[policy] = {request.request_id: [] for request in requests}
        for one in news:
            found[policy][one.request_id] += [*zip(one.token_ids, one.logprobs or (), strict=True)]
    assert all(answers == found["fcfs"] for answers in found.values())
    assert all(len(tokens) > 2 for tokens in found["fcfs"].values())
