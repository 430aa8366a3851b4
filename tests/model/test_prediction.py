"""Multi-token prediction against its paper's equations in plain torch, with transformers' layers.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", equations 21 to 23; checkpoints put the token before the state.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.format import open_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.checkpoint.prediction import load_prediction
from shoal.model.speculation.length import FixedLength, LengthRule
from shoal.model.speculation.mtp import MTPProposer
from shoal.model.speculation.proposer import Candidate, Proposal
from shoal.model.speculation.speculation import Speculation
from shoal.model.step.batch import Backend
from shoal.model.step.executor import ModelExecutor
from shoal.model.step.rows import BatchRows
from shoal.scheduler.errors import CheckpointError
from tests.fakes import Harness
from tests.model.families import make

BLOCK_SIZE = 16
MAX_MODEL_LEN = 128
LAYER = "model.layers.2."
BACKENDS: dict[str, Callable[..., Backend]] = {
    "torch": TorchBackend,
    "native": lambda record, **size: NativeBackend(record, num_threads=1, **size),
}
each_backend = pytest.mark.parametrize(
    "kind",
    [
        "torch",
        pytest.param(
            "native", marks=pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
        ),
    ],
)


class Oracle:
    """A model of three layers, of which the last is the module's, and the other parts of the module."""

    def __init__(self, name: str, *, shares: bool) -> None:
        self.model = make(name, num_hidden_layers=3)
        body, width = self.model.model, self.model.config.hidden_size
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

        vocab_size = self.model.config.vocab_size
        gains = ("enorm", "hnorm", "shared_head.norm")
        self.parts = {name: torch.rand(width, generator=generator) + 0.5 for name in gains}
        self.parts["eh_proj"] = draw(width, 2 * width)
        if not shares:
            self.parts |= {"embed_tokens": draw(vocab_size, width) * 7, "shared_head.head": draw(vocab_size, width)}
        self.embedding = self.parts.get("embed_tokens", body.embed_tokens.weight)
        self.head = self.parts.get("shared_head.head", self.model.lm_head.weight)
        self.layer, self.layers = body.layers[2], body.layers[:2]

    def write(self, folder: Path) -> Path:
        self.model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
        own = {f"{LAYER}{name}.weight": tensor.detach().contiguous() for name, tensor in self.parts.items()}
        save_file(load_file(folder / "model.safetensors") | own, folder / "model.safetensors")
        return folder

    @torch.no_grad()
    def draft(self, text: list[int], count: int) -> list[int]:
        """What the module drafts greedily after a text; fewer where two tokens are nearly as good."""
        x = self.model.model.embed_tokens(torch.tensor([text]))
        for layer in self.layers:
            x = self._run(layer, x)
        states, tokens, drafted = self.model.model.norm(x)[0, :-1], text[1:], []
        for _ in range(count):
            embedded = self.embedding[torch.tensor(tokens)]
            normed = self._norm(embedded, "enorm"), self._norm(states, "hnorm")
            x = torch.cat(normed, dim=-1) @ self.parts["eh_proj"].T
            state = self._norm(self._run(self.layer, x[None])[0, -1:], "shared_head.norm")
            first, second = (state @ self.head.T)[0].topk(2).values.tolist()
            if first - second < 1e-3:
                break
            drafted.append(int((state @ self.head.T).argmax()))
            tokens, states = [*tokens, drafted[-1]], torch.cat([states, state])
        return drafted

    def _run(self, layer: Any, x: Tensor) -> Tensor:
        """The layer over states [1, length, hidden] at the first positions."""
        length = x.shape[1]
        positions = torch.arange(length)[None]
        table = self.model.model.rotary_emb(x, positions)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        output = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=table)
        return output if isinstance(output, Tensor) else output[0]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.model.config.rms_norm_eps
        return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * self.parts[name]


@cache
def oracle_of(name: str, *, shares: bool) -> Oracle:
    return Oracle(name, shares=shares)


class Recording(MTPProposer):
    """Keeps each text and what was drafted after it."""

    proposed: list[tuple[list[int], list[int]]]

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        proposals = super().propose(candidates)
        for one in candidates:
            text = self._rows.token_ids[one.row, : one.num_tokens].tolist()
            self.proposed.append((text, proposals[one.row].token_ids))
        return proposals


def serve(
    kind: str,
    folder: Path,
    prompts: list[list[int]],
    *,
    num_blocks: int = 100,
    lengths: LengthRule | None = None,
    enable_prefix_caching: bool = False,
) -> tuple[Harness, list[tuple[list[int], list[int]]]]:
    """Serve the prompts greedily in chunks, one joining every third step; gives what was drafted as well."""
    target = load_checkpoint(folder)
    prediction = load_prediction(open_checkpoint(folder), target)
    proposed: list[tuple[list[int], list[int]]] = []

    def speculate(rows: BatchRows) -> Speculation:
        backend = BACKENDS[kind](prediction.model, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        proposer = Recording(prediction, backend, rows, num_blocks=num_blocks, draws_apart=False)
        proposer.proposed = proposed
        return Speculation(proposer, lengths or FixedLength(3), rows, needs_slots=True, by_rejection=False)

    executor = ModelExecutor(
        BACKENDS[kind](target, num_blocks=num_blocks, block_size=BLOCK_SIZE),
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        speculate=speculate,
    )
    harness = Harness(
        executor=executor,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=24,
        num_lookahead_tokens=8,
        enable_prefix_caching=enable_prefix_caching,
    )
    for index, prompt in enumerate(prompts):
        harness.add(f"r{index}", prompt, temperature=0.0, max_tokens=20)
        for _ in range(3):
            harness.step()
    harness.drain()
    return harness, proposed


def random_prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 1000, int(rng.integers(2, 70))).tolist() for _ in range(count)]


@each_backend
@pytest.mark.parametrize(("name", "shares"), [("deepseek_v3", False), ("deepseek_v3", True), ("glm4_moe", False)])
def test_greedy_drafts_are_those_of_the_equations(kind: str, name: str, shares: bool, tmp_path: Path) -> None:
    """Of prompts in chunks, of several requests at once, and after drafts that were rejected."""
    oracle = oracle_of(name, shares=shares)
    _, proposed = serve(kind, oracle.write(tmp_path), random_prompts(4))
    assert len(proposed) > 30
    for text, drafted in proposed[::3]:
        expected = oracle.draft(text, len(drafted))
        assert drafted[: len(expected)] == expected


@each_backend
def test_drafts_after_preemption_and_prefix_hits(kind: str, tmp_path: Path) -> None:
    """The texts are equal, and so even the last position of a block in the cache was read with the right token."""
    oracle = oracle_of("deepseek_v3", shares=False)
    prompts = random_prompts(3)[-1:] * 4
    harness, proposed = serve(kind, oracle.write(tmp_path), prompts, num_blocks=9, enable_prefix_caching=True)
    stats = harness.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    assert sum(bool(drafted) for _, drafted in proposed) > 20
    for text, drafted in proposed[::3]:
        expected = oracle.draft(text, len(drafted))
        assert drafted[: len(expected)] == expected


def test_states_wait_for_the_next_proposal(tmp_path: Path) -> None:
    class Rare(FixedLength):
        """Drafts in every 19th decision alone, when more states than may wait have come."""

        calls = 0

        def lengths(self, rows: list[int]) -> list[int]:
            self.calls += 1
            return [3 if self.calls % 19 == 0 else 0] * len(rows)

    oracle = oracle_of("deepseek_v3", shares=False)
    _, proposed = serve("torch", oracle.write(tmp_path), random_prompts(5), lengths=Rare(3))
    assert proposed
    for text, drafted in proposed:
        expected = oracle.draft(text, 3)
        assert drafted[: len(expected)] == expected


def test_a_checkpoint_without_a_module_is_refused(tmp_path: Path) -> None:
    make("deepseek_v3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for count in (0, 1):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": count}))
        with pytest.raises(CheckpointError, match="has no module of multi-token prediction"):
            load_prediction(open_checkpoint(tmp_path), load_checkpoint(tmp_path))


def test_a_module_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    oracle = Oracle("deepseek_v3", shares=True)
    oracle.parts["eh_proj"] = oracle.parts["eh_proj"][:, 1:]
    folder = oracle.write(tmp_path)
    with pytest.raises(CheckpointError, match=r"eh_proj.weight: expected shape \[56, 112\], found \[56, 111\]"):
        load_prediction(open_checkpoint(folder), load_checkpoint(folder))
