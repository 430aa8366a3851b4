"""The engine and the requests that the benchmarks run."""

from __future__ import annotations

import random
import time
from pathlib import Path

from shoal.model.step.batch import Backend, ForwardBatch, SamplerOutput, SamplingBatch
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.output import SamplingParams
from shoal.scheduler.request import Request
from shoal.server.engine.build import build_engine
from shoal.server.sources import load_settings


class TimedBackend:
    """Times the steps of a backend for the executor.

    Attributes:
        seconds: of the last step.
        chooses_all: whether the last step chose a token after each that it computed: no prompt was in it.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.seconds = 0.0
        self.chooses_all = False

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        began = time.perf_counter()
        output = self.backend.execute(batch, sampling)
        self.seconds = time.perf_counter() - began
        self.chooses_all = len(batch.logits_indices) == len(batch.token_ids)
        return output


def make_engine(checkpoint: Path, arguments: list[str]) -> tuple[EngineCore, TimedBackend]:
    """The engine that `shoal serve` with these arguments would run, in this process."""
    core = build_engine(load_settings(["--model", str(checkpoint), *arguments])).core
    timed = TimedBackend(core.executor.backend)  # type: ignore[attr-defined]  # it is a ModelExecutor
    core.executor.backend = timed  # type: ignore[attr-defined]
    return core, timed


def make_request(request_id: str, num_prompt_tokens: int, max_tokens: int, vocab_size: int) -> Request:
    """A request with a random prompt that nothing ends but its length."""
    tokens = random.Random(request_id).choices(range(vocab_size), k=num_prompt_tokens)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
    return Request(request_id, tokens, params, time.monotonic())
