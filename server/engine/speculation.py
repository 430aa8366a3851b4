"""What drafts tokens, as the settings ask for it, checked against the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from shoal.model.checkpoint.find import find_draft
from shoal.model.checkpoint.format import CheckpointFormat
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.checkpoint.prediction import load_prediction
from shoal.model.prediction import Prediction
from shoal.model.record import ModelRecord
from shoal.model.speculation.config import ADAPTIVE_MOST, MOST_SPEC_TOKENS, SpeculationConfig
from shoal.model.speculation.draft_model import DraftModelProposer
from shoal.model.speculation.length import AdaptiveLength, FixedLength
from shoal.model.speculation.mtp import MTPProposer
from shoal.model.speculation.proposer import Proposer
from shoal.model.speculation.self_speculative import SelfSpeculativeProposer
from shoal.model.speculation.speculation import Speculation
from shoal.model.speculation.suffix import SuffixProposer
from shoal.model.step.batch import Backend
from shoal.model.step.rows import BatchRows
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError
from shoal.server.engine.backends import NativePlan, TorchPlan


@dataclass(frozen=True)
class SpeculationPlan:
    """How tokens will be drafted.

    Attributes:
        draft: the draft model, if there is one, or the module's layers.  Its cache keeps all, because it uses the
            target's block tables.
        num_layers: layers of the target that draft, for self-speculation.
        prediction: the module of multi-token prediction, if it drafts.
    """

    config: SpeculationConfig
    draft: ModelRecord | None = None
    num_layers: int | None = None
    prediction: Prediction | None = None

    @property
    def num_lookahead_tokens(self) -> int:
        """How far beyond the known tokens drafting writes to the KV cache; the last drafted token is never read."""
        if self.config.method == "suffix":
            return 0
        return self.config.num_spec_tokens or ADAPTIVE_MOST

    def create(
        self, backends: NativePlan | TorchPlan, target: Backend, limits: SchedulerConfig, rows: BatchRows
    ) -> Speculation:
        """Put it together around the target's backend and the rows of the batch."""
        config, fixed = self.config, self.config.num_spec_tokens
        by_rejection = config.verification == "rejection"
        proposer: Proposer
        if self.draft is not None:
            num_blocks = limits.num_blocks
            backend = backends.create(self.draft, num_blocks, sibling=target)
            if self.prediction is not None:
                proposer = MTPProposer(self.prediction, backend, rows, num_blocks=num_blocks, draws_apart=by_rejection)
            else:
                proposer = DraftModelProposer(
                    backend,
                    rows,
                    num_blocks=num_blocks,
                    max_catch_up=limits.max_num_batched_tokens,
                    draws_apart=by_rejection,
                )
        elif self.num_layers is not None:
            proposer = SelfSpeculativeProposer(target, rows, num_layers=self.num_layers, draws_apart=by_rejection)
        else:
            proposer = SuffixProposer(rows)
        needs_slots = config.method != "suffix"
        most = ADAPTIVE_MOST if needs_slots else MOST_SPEC_TOKENS
        lengths = AdaptiveLength(rows.max_num_seqs, most) if fixed is None else FixedLength(fixed)
        return Speculation(proposer, lengths, rows, needs_slots=needs_slots, by_rejection=by_rejection)


def plan_speculation(
    config: SpeculationConfig, checkpoint: CheckpointFormat, target: ModelRecord, max_model_len: int
) -> SpeculationPlan | None:
    """Check what the settings ask for, and load the draft model, or the module that belongs to the target's
    checkpoint; None if nothing drafts.

    Raises:
        CheckpointError: the draft model or the module cannot be read, or there is no module.
        ConfigError: it does not fit the target, or the target has too few layers.
    """
    match config.method:
        case "off":
            return None
        case "suffix":
            return SpeculationPlan(config)
        case "self":
            return SpeculationPlan(config, num_layers=_num_layers(config, target.config.num_layers))
        case "draft":
            return SpeculationPlan(config, _load_draft(find_draft(config.draft_model), target, max_model_len))
        case "mtp":
            prediction = load_prediction(checkpoint, target)
            return SpeculationPlan(config, _for_target(prediction.model, max_model_len), prediction=prediction)


def _num_layers(config: SpeculationConfig, of: int) -> int:
    wanted = config.draft_layers or max(1, of // 3)
    if wanted >= of:
        raise ConfigError(
            f"draft_layers {wanted} leaves nothing to verify with: the model has {of} layers", param="draft_layers"
        )
    return wanted


def _load_draft(path: Path, target: ModelRecord, max_model_len: int) -> ModelRecord:
    draft = load_checkpoint(path)
    if draft.config.vocab_size != target.config.vocab_size:
        raise ConfigError(
            f"draft_model {path} has a vocabulary of {draft.config.vocab_size} tokens, "
            f"the model one of {target.config.vocab_size}: they need the same tokenizer",
            param="draft_model",
        )
    if draft.config.max_position_embeddings < max_model_len:
        raise ConfigError(
            f"draft_model {path} has {draft.config.max_position_embeddings} positions, "
            f"fewer than max_model_len {max_model_len}",
            param="draft_model",
        )
    return _for_target(draft, max_model_len)


def _for_target(draft: ModelRecord, max_model_len: int) -> ModelRecord:
    """The model, with a cache that takes the target's block tables."""
    return replace(draft, config=replace(draft.config.within(max_model_len), keeps_all=True))
