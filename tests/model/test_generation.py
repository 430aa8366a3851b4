"""Whole texts through scheduler, executor and torch backend, against transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from model.backends.torch_backend import TorchBackend
from model.checkpoint import load_checkpoint
from model.executor import ModelExecutor
from scheduler.config import SchedulerConfig
from scheduler.engine import EngineCore
from scheduler.output import RequestOutput, SamplingParams, SchedulerStats
from scheduler.policies import create_policy
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from tests.model.test_torch_backend import SHAPES

BLOCK_SIZE = 4
LIMITS = {"max_model_len": 80, "max_num_seqs": 5, "max_num_batched_tokens": 24, "max_chunk_tokens": 7}


def make_requests(temperature: float) -> list[Request]:
    """Prompts of 1 to 40 tokens, two of which begin alike, and 3 to 24 tokens to generate."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 96, n).tolist() for n in (1, 40, 3, 17, 8, 29, 12, 33)]
    prompts.insert(2, [*prompts[1][:21], 7, 7])
    params = [
        SamplingParams(
            max_tokens=3 + 7 * i % 22, seed=i, num_logprobs=2, stop_token_ids=frozenset([2]), temperature=temperature
        )
        for i in range(len(prompts))
    ]
    return [Request(str(i), prompts[i], params[i], arrival_time=0.0) for i in range(len(prompts))]


def run(
    folder: Path, requests: Sequence[Request], *, num_blocks: int, **limits: int
) -> tuple[SchedulerStats, list[RequestOutput]]:
    """Let a new request join every second step, whatever the others do; check the blocks after each step."""
    config = SchedulerConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE, **{**LIMITS, **limits})
    backend = TorchBackend(load_checkpoint(folder), num_blocks=num_blocks, block_size=BLOCK_SIZE)
    executor = ModelExecutor(
        backend, max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len, block_size=BLOCK_SIZE
    )
    core = EngineCore(Scheduler(config, create_policy("fcfs")), executor, lambda: 0.0)
    news: list[RequestOutput] = []
    to_come = list(requests)
    step = 0
    while to_come or core.scheduler.num_unfinished:
        if to_come and step % 2 == 0:
            core.scheduler.add(to_come.pop(0))
        news += core.step()
        core.scheduler.check_invariants()
        step += 1
    return core.scheduler.stats(), news


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_texts_are_those_of_transformers(shape: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(shape.partition("-")[0], **SHAPES[shape])
    requests = make_requests(0.0)
    stats, _ = run(folder, requests, num_blocks=19)
    assert stats.num_preemptions > 0, "the pool was meant to be too small"
    assert stats.num_prefix_hits > 0, "two prompts were meant to begin alike"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for request in requests:
        prompt = torch.tensor([request.token_ids[: request.num_prompt_tokens]])
        settings = GenerationConfig(max_new_tokens=request.params.max_tokens, do_sample=False, pad_token_id=0)
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        assert request.token_ids == expected[0].tolist()


@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_texts_and_logprobs_do_not_depend_on_company_chunks_cache_or_preemption(
    shape: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """To the bit: the promise that the torch backend keeps on the CPU in float32."""
    folder = tiny_checkpoint(shape)

    def everything(requests: list[Request], **how: int) -> dict[str, list[object]]:
        _, news = run(folder, requests, **how)
        found: dict[str, list[object]] = {request.request_id: [] for request in requests}
        for one in news:
            found[one.request_id] += [*zip(one.token_ids, one.logprobs, strict=True)]
        return found

    together = everything(make_requests(1.0), num_blocks=19)
    whole = everything(make_requests(1.0), num_blocks=400, max_chunk_tokens=80, max_num_batched_tokens=80)
    alone = {}
    for request in make_requests(1.0):
        alone |= everything([request], num_blocks=400, max_num_seqs=1)
    assert together == whole == alone
