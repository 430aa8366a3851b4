"""Builders of small checkpoints and of batches, shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from shoal.model.step.batch import BIAS, PENALTY, ForwardBatch, SamplingBatch
from shoal.model.step.sampling import sampling_rows


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Paged:
    """Gives sequences blocks at scattered places and builds the batches that compute their tokens."""

    num_blocks: int
    block_size: int
    free: list[int] = field(default_factory=list)
    tables: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = np.random.default_rng(7).permutation(self.num_blocks).tolist()

    def release(self, name: str) -> None:
        self.free = self.tables.pop(name) + self.free

    def batch(self, parts: Sequence[tuple[str, Sequence[int], int]], *, all_logits: bool = True) -> ForwardBatch:
        """Each part is (sequence, tokens to compute, position of the first); logits of all tokens or the last ones."""
        for name, tokens, start in parts:
            table = self.tables.setdefault(name, [])
            while len(table) * self.block_size < start + len(tokens):
                table.append(self.free.pop())
        positions = [start + i for _, tokens, start in parts for i in range(len(tokens))]
        slots = [
            self.tables[name][(start + i) // self.block_size] * self.block_size + (start + i) % self.block_size
            for name, tokens, start in parts
            for i in range(len(tokens))
        ]
        ends = np.cumsum([len(tokens) for _, tokens, _ in parts])
        tables = np.zeros((len(parts), max(len(self.tables[name]) for name, _, _ in parts)), np.int32)
        for row, (name, _, _) in enumerate(parts):
            tables[row, : len(self.tables[name])] = self.tables[name]
        return ForwardBatch(
            token_ids=np.array([t for _, tokens, _ in parts for t in tokens], np.int32),
            positions=np.array(positions, np.int32),
            slot_mapping=np.array(slots, np.int32),
            query_start_loc=np.array([0, *ends], np.int32),
            context_lens=np.array([start + len(tokens) for _, tokens, start in parts], np.int32),
            block_tables=tables,
            logits_indices=np.arange(ends[-1], dtype=np.int32) if all_logits else (ends - 1).astype(np.int32),
        )


@pytest.fixture
def paged() -> type[Paged]:
    return Paged


def _sampling_batch(
    num_rows: int,
    *,
    penalties: Iterable[Any] = (),
    biases: Iterable[Any] = (),
    named: Mapping[int, Sequence[int]] | None = None,
    **fields: Any,
) -> SamplingBatch:
    """Greedy rows without any option, except for the given fields; entries are tuples in the order of their fields.

    `named` are the `logprob_token_ids` of rows.
    """
    rows = sampling_rows(num_rows, **{"temperature": 0.0} | fields)
    for row, token_ids in (named or {}).items():
        rows["num_logprobs"][row] = len(token_ids)
        rows["logprob_token_ids"][row, : len(token_ids)] = token_ids
    return SamplingBatch(rows, np.array(list(penalties), PENALTY), np.array(list(biases), BIAS))


@pytest.fixture
def sampling_batch() -> Callable[..., SamplingBatch]:
    return _sampling_batch


_TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A transformers model with random weights, larger than its initializer makes them so that logits differ."""
    torch.manual_seed(seed)
    if architecture == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**{**_TINY, **overrides}))
    else:
        moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(MixtralConfig(**{**_TINY, **moe, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    return _tiny_model


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny model with `save_pretrained` and give the folder."""

    def write(architecture: str = "llama", **overrides: Any) -> Path:
        folder = tmp_path / architecture
        _tiny_model(architecture, **overrides).save_pretrained(folder)
        return folder

    return write
