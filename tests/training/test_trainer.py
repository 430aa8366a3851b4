"""Training: it learns, it resumes exactly, and it refuses what does not belong together."""

from contextlib import suppress
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.model.training.network import Network
from shoal.model.training.recipe import Budget, Recipe
from shoal.model.training.tokens import Tokens, batch_of_windows, load_tokens, save_tokens
from shoal.model.training.trainer import StepReport, Trainer, learning_rate, run
from shoal.scheduler.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0).integers(0, 300, size=16 * 40 + 1).astype(np.uint16)
BUDGET = Budget(tokens=20 * 64)


class StoppedError(Exception):
    """The run is killed."""


def train(
    recipe: Recipe,
    checkpoint: Path,
    *,
    tokens: Tokens = RANDOM,
    teacher: Network | None = None,
    budget: Budget = BUDGET,
    resume: bool = False,
    stop_after: int | None = None,
) -> tuple[Trainer, list[StepReport]]:
    """Train with a clock that ticks once a step.

    Returns:
        The trainer, and the reports up to the step before the run is killed.
    """
    trainer = Trainer(recipe, tokens, "fingerprint", CPU, teacher)
    if resume:
        trainer.load(checkpoint)
    reports: list[StepReport] = []

    def observe(report: StepReport) -> None:
        if report.step == stop_after:
            raise StoppedError
        reports.append(report)

    ticks = map(float, count())
    with suppress(StoppedError):
        run(
            trainer,
            budget,
            checkpoint=checkpoint,
            checkpoint_seconds=4.0,
            clock=lambda: next(ticks),
            observe=observe,
        )
    return trainer, reports


def test_a_killed_run_resumes_with_the_losses_of_an_unbroken_one(tiny_recipe: Recipe, tmp_path: Path) -> None:
    _, unbroken = train(tiny_recipe, tmp_path / "a.pt")
    _, before = train(tiny_recipe, tmp_path / "b.pt", stop_after=11)
    _, after = train(tiny_recipe, tmp_path / "b.pt", resume=True)
    assert [report.step for report in before] == list(range(1, 11))
    assert [report.step for report in after] == list(range(9, 21))
    assert before[:8] + after == unbroken


def test_the_rate_reaches_zero_when_the_seconds_are_spent(tiny_recipe: Recipe, tmp_path: Path) -> None:
    _, reports = train(tiny_recipe, tmp_path / "a.pt", budget=Budget(seconds=10))
    rates = [report.learning_rate / tiny_recipe.training.learning_rate for report in reports]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert reports[-1].spent == 1


def test_a_spent_budget_trains_no_further_and_a_larger_one_does(tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(tiny_recipe, tmp_path / "a.pt")
    assert train(tiny_recipe, tmp_path / "a.pt", resume=True)[1] == []
    more = Budget(tokens=22 * 64)
    assert len(train(tiny_recipe, tmp_path / "a.pt", resume=True, budget=more)[1]) == 2


def test_it_learns(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Every token comes twice.

    A model that knows only the last token has a loss of log(2) + log(64) / 2; one that also counts, log(64) / 2.
    """
    tokens = np.random.default_rng(1).integers(0, 64, size=4000).repeat(2).astype(np.uint16)
    _, reports = train(tiny_recipe, tmp_path / "a.pt", tokens=tokens, budget=Budget(tokens=150 * 64))
    assert np.log(64) / 2 < np.mean([report.loss for report in reports[-20:]]) < np.log(2) + np.log(64) / 2


def test_a_draft_learns_its_teachers_distribution(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """The loss falls towards the teacher's own entropy, which is far below the entropy of the random text."""
    teacher = Network(tiny_recipe.network)
    teacher.initialize(seed=2)
    with torch.no_grad():
        teacher.embedding.weight.mul_(30)
    _, reports = train(tiny_recipe, tmp_path / "a.pt", teacher=teacher, budget=Budget(tokens=100 * 64))
    windows = torch.from_numpy(batch_of_windows(RANDOM, 16, 32, step=0, seed=0))[:, :-1]
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=teacher(windows)).entropy().mean().item()
    losses = [report.loss for report in reports]
    assert np.mean(losses[-20:]) - entropy < 0.25 * (losses[0] - entropy)
    assert entropy < np.log(300) - 0.5


def test_sequences_are_short_at_first(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    loss = Network.loss

    def spy(self: Network, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(tuple(inputs.shape))
        torch.testing.assert_close(inputs[:, 1:], targets[:, :-1])
        return loss(self, inputs, targets)

    monkeypatch.setattr(Network, "loss", spy)
    config = replace(tiny_recipe.training, short_length=4, lengthen_from=0.25)
    train(replace(tiny_recipe, training=config), tmp_path / "a.pt")
    assert shapes == [(16, 4)] * 5 + [(4, 16)] * 15


def test_every_epoch_visits_every_window_once() -> None:
    tokens = np.arange(10 * 8 + 1, dtype=np.uint16)
    batches = [batch_of_windows(tokens, length=8, batch_size=5, step=step, seed=3) for step in range(4)]
    epochs = [np.concatenate(batches[:2]), np.concatenate(batches[2:])]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 80, 8))
        np.testing.assert_array_equal(epoch - epoch[:, :1], np.tile(np.arange(9), (10, 1)))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_checkpoint_that_does_not_belong_or_is_damaged_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    trainer, _ = train(tiny_recipe, tmp_path / "a.pt", stop_after=1)
    trainer.save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        Trainer(tiny_recipe, RANDOM, "other", CPU, teacher=None).load(tmp_path / "a.pt")
    other = replace(tiny_recipe, network=replace(tiny_recipe.network, hidden_size=64))
    with pytest.raises(CheckpointError, match="another recipe"):
        Trainer(other, RANDOM, "fingerprint", CPU, teacher=None).load(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"b\.pt is missing"):
        trainer.load(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"c\.pt cannot be read"):
        trainer.load(tmp_path / "c.pt")


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    save_tokens(tmp_path, {"train": RANDOM}, "fingerprint")
    np.testing.assert_array_equal(load_tokens(tmp_path, "train", "fingerprint"), RANDOM)
    with pytest.raises(ConfigError, match="another tokenizer"):
        load_tokens(tmp_path, "train", "other")


def test_too_few_tokens_are_refused_before_training(tiny_recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="16 tokens are too few for a sequence of 16"):
        Trainer(tiny_recipe, RANDOM[:16], "fingerprint", CPU, teacher=None)


def test_the_learning_rate_never_exceeds_its_peak(tiny_recipe: Recipe) -> None:
    config = tiny_recipe.training
    rates = [learning_rate(config, step, spent=step / 50) for step in islice(count(), 51)]
    assert max(rates) == config.learning_rate
    assert rates[-1] == 0
