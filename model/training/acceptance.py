"""How often the target accepts what a draft proposes, under Shoal's rule of verification.

Draft and target choose with the same noise, and a drafted token is accepted exactly when the target chooses it
(`model/step/sampling.py` specifies the choice).  So the text is always the target's own.  One such text, and the
draft's choice at each of its positions, give the acceptance for every length of proposal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.model.step.noise import gumbel_noise

TEMPERATURES = (0.0, 0.8, 1.0)
NUM_SPEC_TOKENS = (2, 4, 6)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How proposals of `num_spec_tokens` tokens were accepted.

    Attributes:
        acceptance_rate: accepted / drafted.
        mean_acceptance_length: tokens per step of the target, including the one that it always adds.
    """

    temperature: float
    num_spec_tokens: int
    acceptance_rate: float
    mean_acceptance_length: float


def measure_acceptance(target: Any, draft: Any, prompts: Tensor, num_tokens: int) -> list[Acceptance]:
    """Have the target continue prompts at each temperature, and count what it accepts of each length of proposal.

    Args:
        target, draft: causal language models of transformers, with the same vocabulary.
        prompts: [num_prompts, length] int64.
        num_tokens: of each continuation.
    """
    figures = []
    for temperature in TEMPERATURES:
        matches = _matches(target, draft, prompts, num_tokens, temperature)
        figures += [_count(matches, temperature, num) for num in NUM_SPEC_TOKENS]
    return figures


@torch.inference_mode()
def _matches(target: Any, draft: Any, prompts: Tensor, num_tokens: int, temperature: float) -> NDArray[np.bool_]:
    """[num_prompts, num_tokens]: whether draft and target, after the same text, choose the same token."""
    start = prompts.shape[1]
    text = target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        logits_processor=[lambda ids, logits: _scores(logits[:, None], ids.shape[1], temperature)[:, 0]],
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=target.config.vocab_size,  # no token has this id: only the length ends a text
        pad_token_id=0,
    )
    proposed = _scores(draft(text[:, :-1]).logits[:, start - 1 :], start, temperature).argmax(dim=-1)
    matches: NDArray[np.bool_] = (proposed == text[:, start:]).numpy()
    return matches


def _scores(logits: Tensor, position: int, temperature: float) -> Tensor:
    """The scores whose greatest is the choice: logits [num_seqs, num_tokens, vocab_size], from `position` on, with
    temperature and noise; the seed is the row."""
    if temperature == 0:
        return logits
    num_seqs, num_tokens, vocab_size = logits.shape
    noise = np.stack(
        [[gumbel_noise(seed, position + i, vocab_size) for i in range(num_tokens)] for seed in range(num_seqs)]
    )
    return logits.double() / temperature + torch.from_numpy(noise)


def _count(matches: NDArray[np.bool_], temperature: float, num_spec_tokens: int) -> Acceptance:
    """Walk through each text as a server would: propose, accept up to the first mismatch, add the target's token."""
    drafted = accepted = tokens = steps = 0
    for row in matches:
        place = 0
        while place + num_spec_tokens < len(row):
            proposal = row[place : place + num_spec_tokens]
            run = num_spec_tokens if proposal.all() else int(proposal.argmin())
            drafted += num_spec_tokens
            accepted += run
            tokens += run + 1
            steps += 1
            place += run + 1
    return Acceptance(temperature, num_spec_tokens, accepted / max(1, drafted), tokens / max(1, steps))
