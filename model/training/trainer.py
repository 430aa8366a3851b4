"""Training: AdamW (Loshchilov & Hutter 2019) with warm-up, a plateau, and a linear decay to zero at the budget's end.

A stopped run continues from its last checkpoint with the losses that it would have had.  The batch of a step depends
only on the step and the seed, and only the first weights are drawn at random.  So the weights, the optimizer's moments
and three counters are the whole state.  (Under a budget in seconds the learning rate follows the clock, so two runs
are equal only if their clocks are.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from shoal.scheduler.errors import CheckpointError

from .network import Network, training_dtype
from .prediction import create_network
from .recipe import Budget, Recipe, TrainingConfig
from .tokens import Tokens, batch_of_windows, count_windows


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did.

    Attributes:
        loss: cross-entropy, nats a token.
        balance: load-balancing loss, 1 at its best.
        tokens, seconds: of all training so far.
        spent: share of the budget, 0 to 1.
    """

    step: int
    loss: float
    balance: float
    learning_rate: float
    tokens: int
    seconds: float
    spent: float


class Trainer:
    """Trains a network, one step at a time.

    Attributes:
        step: steps done.
        tokens, seconds: the tokens that those steps trained on, and their time.
    """

    def __init__(
        self, recipe: Recipe, tokens: Tokens, tokenizer_fingerprint: str, device: torch.device, teacher: Network | None
    ) -> None:
        """Start from the first step.

        Args:
            teacher: the network that a draft is distilled from, on any device; None trains on the tokens themselves.
        """
        count_windows(tokens, recipe.training.sequence_length)
        self.recipe, self._data, self._fingerprint = recipe, tokens, tokenizer_fingerprint
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._device, self._teacher = device, teacher and teacher.to(device)
        self.network = create_network(recipe, training_dtype(device))
        self.network.initialize(recipe.training.seed)
        self.network.to(device)
        self._optimizer = _adamw(self.network, recipe.training)

    def train_step(self, spent: float) -> tuple[float, float, float]:
        """Take one step after the share `spent` of the budget; returns loss, balance loss and learning rate."""
        config = self.recipe.training
        windows = batch_of_windows(self._data, config.sequence_length, config.batch_size, self.step, config.seed)
        rate = learning_rate(config, self.step, spent)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss, balance = self._loss(torch.from_numpy(windows).to(self._device), spent)
        (loss + config.balance_coefficient * balance).backward()  # type: ignore[no-untyped-call]  # torch's gap
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self.tokens += config.batch_size * config.sequence_length
        return loss.item(), balance.item(), rate

    def _loss(self, windows: Tensor, spent: float) -> tuple[Tensor, Tensor]:
        """The loss and the balance loss of windows [batch, sequence_length + 1], which are cut into pieces at first."""
        config = self.recipe.training
        length = config.short_length if spent < config.lengthen_from else config.sequence_length
        inputs, targets = (windows[:, cut].reshape(-1, length) for cut in (slice(None, -1), slice(1, None)))
        if self._teacher is not None:
            by_acceptance = spent >= self.recipe.acceptance_from
            return self.network.distillation_loss(inputs, self._teacher, by_acceptance=by_acceptance)
        return self.network.loss(inputs, targets)

    def save(self, path: Path) -> None:
        """Write the state; at any time the file is either the old one or the new one."""
        state = {
            "recipe": asdict(self.recipe),
            "tokenizer": self._fingerprint,
            "counters": (self.step, self.tokens, self.seconds),
            "hardware": _hardware(self._device),
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; CheckpointError if it is of another recipe or another tokenizer."""
        state = load_state(path, self.recipe, self._fingerprint)
        self.step, self.tokens, self.seconds = state["counters"]
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])


def load_state(path: Path, recipe: Recipe, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Read a training checkpoint; CheckpointError if it is missing, damaged, or of another recipe or tokenizer."""
    if not path.is_file():
        raise CheckpointError(f"training checkpoint {path} is missing", param=path.name)
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise CheckpointError(f"training checkpoint {path} cannot be read: {error}", param=path.name) from error
    if state["tokenizer"] != tokenizer_fingerprint:
        raise CheckpointError(f"{path} was trained with another tokenizer", param="tokenizer.json")
    if state["recipe"] != asdict(recipe):
        raise CheckpointError(f"{path} was trained with another recipe", param=path.name)
    return state


def learning_rate(config: TrainingConfig, step: int, spent: float) -> float:
    """Linear warm-up over steps, then the plateau, then linear to zero from `decay_from` of the budget to its end."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    decay = min(1.0, (1 - spent) / (1 - config.decay_from))
    return config.learning_rate * warmup * decay


def _hardware(device: torch.device) -> str:
    """The machine, as the model card names it."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"{torch.get_num_threads()} CPU threads"


def _adamw(network: Network, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices but not norms."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def run(
    trainer: Trainer,
    budget: Budget,
    *,
    checkpoint: Path,
    checkpoint_seconds: float,
    clock: Callable[[], float],
    observe: Callable[[StepReport], None],
) -> None:
    """Train until the budget is spent, saving every `checkpoint_seconds` and at the end.

    Args:
        clock: a monotonic clock, in seconds.
        observe: called after every step.
    """
    last, saved = clock(), trainer.seconds
    while (spent := budget.spent(trainer.tokens, trainer.seconds)) < 1:
        loss, balance, rate = trainer.train_step(spent)
        now = clock()
        trainer.seconds += now - last
        last = now
        spent = budget.spent(trainer.tokens, trainer.seconds)
        observe(StepReport(trainer.step, loss, balance, rate, trainer.tokens, trainer.seconds, spent))
        if spent == 1 or trainer.seconds - saved >= checkpoint_seconds:
            trainer.save(checkpoint)
            saved = trainer.seconds
