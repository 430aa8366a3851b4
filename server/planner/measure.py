"""Steps of the engine's backend, timed."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from math import inf

import numpy as np

from shoal.model.architecture import ModelConfig
from shoal.model.backends.config import BackendConfig, CacheConfig
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.step.batch import ForwardBatch, SamplingBatch
from shoal.model.step.sampling import sampling_rows
from shoal.server.engine.backends import plan_backend
from shoal.server.planner.costs import Step
from shoal.server.planner.machines import faster, least_seconds
from shoal.server.planner.subject import Subject, measure_for

_TURNS = 8
_SECONDS = 0.15  # of each kind of work in a turn
_PAUSE = 0.05  # seconds in which threads of numpy's products stop spinning
_SHORT = 512  # tokens of a prompt that is measured, and of the sequences of a batch


def uniform_step(config: ModelConfig, step: Step, block_size: int) -> tuple[ForwardBatch, SamplingBatch]:
    """The arrays of a step in which each sequence has blocks of its own, and choices are greedy."""
    num_groups, each = len(config.cache_groups), step.num_tokens
    num_tokens, per_seq = step.num_seqs * each, -(-step.length // block_size) * num_groups
    positions = np.arange(step.length - each, step.length, dtype=np.int32)
    tables = np.arange(step.num_seqs * per_seq, dtype=np.int32).reshape(step.num_seqs, per_seq)
    slots = [
        tables[:, positions // block_size * num_groups + group] * np.int32(block_size) + positions % block_size
        for group in range(num_groups)
    ]
    batch = ForwardBatch(
        token_ids=np.random.default_rng(0).integers(0, config.vocab_size, num_tokens, np.int32),
        positions=np.tile(positions, step.num_seqs),
        slot_mapping=np.array([own.reshape(-1) for own in slots], np.int32),
        query_start_loc=np.arange(0, num_tokens + 1, each, dtype=np.int32),
        context_lens=np.full(step.num_seqs, step.length, np.int32),
        block_tables=tables,
        logits_indices=np.arange(num_tokens - step.num_logits, num_tokens, dtype=np.int32),
    )
    return batch, SamplingBatch(sampling_rows(step.num_logits, temperature=0))


def measure_steps(model: str, subject: Subject, batch: int) -> tuple[Subject, list[tuple[Step, float]]]:
    """Time a prefill and decode steps of one sequence and of a batch, in turns with the machine.

    The best of all turns counts for both, because other load and neighbours slow a machine for seconds at a time.

    Returns:
        The subject on the machine as it was then, and the steps with their seconds.

    Raises:
        CheckpointError, ConfigError: the model cannot be loaded, or nothing can serve it here.
    """
    costs, machine, context = subject.costs, subject.machine, subject.context
    record = load_checkpoint(resolve_checkpoint(model))
    cache = CacheConfig()
    plan = plan_backend(BackendConfig(), cache, record.config)
    short = min(context, _SHORT)
    most = max(int(machine.memory / 4 // costs.cache_bytes(short)), 1)
    steps = [Step.prefill(short), Step.decode(1, context), Step.decode(min(batch, most), short)]
    arrays = [uniform_step(record.config, step, cache.block_size) for step in steps]
    backend = plan.create(record, max(own.block_tables.size for own, _ in arrays))
    times = [inf] * len(steps)
    for _ in range(_TURNS):
        machine = faster(machine, measure_for(costs, context, _SECONDS))
        time.sleep(_PAUSE)
        times = [
            min(seconds, least_seconds(partial(backend.execute, *own), _SECONDS))
            for seconds, own in zip(times, arrays, strict=True)
        ]
    return replace(subject, machine=machine), list(zip(steps, times, strict=True))
