"""What may be set of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.scheduler.config import Config, setting

MOST_SPEC_TOKENS = 16  # of any proposal
ADAPTIVE_MOST = 8  # of an adaptive one, if drafting runs a model


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig(Config):
    """Speculative decoding: drafting the next tokens, and verifying them in one step."""

    method: Literal["off", "draft", "mtp", "self", "suffix"] = setting(
        "off",
        help="What drafts: a draft model, the model's module of multi-token prediction (mtp), a look at recent texts "
        "(suffix), the model's first layers (self), or nothing.",
    )
    num_spec_tokens: int | None = setting(
        None,
        at_least=1,
        at_most=MOST_SPEC_TOKENS,
        help="Drafted tokens per request and step; if not set, as many as pay, which may be none.",
    )
    draft_model: str = setting(
        "shoal-draft", help="Checkpoint or bundled name of the draft model; it must have the model's tokenizer."
    )
    draft_layers: int | None = setting(
        None, at_least=1, help="Layers that the method self drafts with; a third of the model's if not set."
    )
    verification: Literal["coupled", "rejection"] = setting(
        "coupled",
        help="coupled keeps every text as it is without speculation; rejection accepts more and keeps only the "
        "distribution of texts.",
    )
