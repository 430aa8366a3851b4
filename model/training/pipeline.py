"""The steps of the recipe, each of which reads what the one before it wrote under the work directory.

    wheels/  ->  corpus/  ->  tokenizer-4096/  ->  tokens-4096/  ->  NAME/checkpoint.pt  ->  the exported folder

A step is skipped when its output exists; to do it again, delete its folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

from . import corpus, sources, tokens
from .card import Provenance, count_active_parameters, model_card
from .evaluation import Evaluator
from .export import export
from .network import Network
from .recipe import Budget, Recipe
from .tokenizer import fingerprint, load_tokenizer, train_tokenizer
from .trainer import StepReport, Trainer, load_state, run

SETS = ("train", "validation")

_TOKENIZER_CHARACTERS = 20_000_000  # of training text that the merges are learnt from
_CHECKPOINT_SECONDS = 90.0
_PROGRESS_STEPS = 10_000


class Pipeline:
    """The steps over one work directory, for one recipe."""

    def __init__(self, work: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.wheels, self.corpus = work / "wheels", work / "corpus"
        self.tokenizer = work / f"tokenizer-{recipe.network.vocab_size}" / "tokenizer.json"
        self.tokens = work / f"tokens-{recipe.network.vocab_size}"
        self.checkpoint = work / recipe.name / "checkpoint.pt"
        self.log = work / recipe.name / "log.jsonl"

    def make_corpus(self) -> None:
        """Download and verify the packages; clean, de-duplicate, cap and split; note the licences."""
        if (self.corpus / "licences.json").exists():
            return
        pins = sources.read_pins()
        sources.download(self.wheels)
        wheels = sources.verify(self.wheels, pins)
        self.corpus.mkdir(parents=True, exist_ok=True)
        for name, documents in zip(SETS, corpus.build(_read_all(wheels)), strict=True):
            corpus.write_documents(documents, self.corpus / f"{name}.jsonl")
        licences = {sources.STDLIB: sources.stdlib_licence()}
        licences |= {f"{pin.name} {pin.version}": sources.read_licence(wheels[pin.name]) for pin in pins}
        _write_last(self.corpus / "licences.json", licences)

    def make_tokenizer(self) -> None:
        """Learn the tokenizer from the beginning of the (shuffled) training documents."""
        if self.tokenizer.exists():
            return
        documents = corpus.read_documents(self.corpus / "train.jsonl")
        tokenizer = train_tokenizer(_texts(documents, _TOKENIZER_CHARACTERS), self.recipe.network.vocab_size)
        self.tokenizer.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(self.tokenizer))

    def make_tokens(self) -> None:
        """Encode both sets."""
        if (self.tokens / "tokenizer.json").exists():
            return
        tokenizer = load_tokenizer(self.tokenizer)
        arrays = {
            name: tokens.encode_documents(corpus.read_documents(self.corpus / f"{name}.jsonl"), tokenizer)
            for name in SETS
        }
        tokens.save_tokens(self.tokens, arrays, fingerprint(self.tokenizer))

    def train(self, budget: Budget) -> None:
        """Train up to the budget, from the last checkpoint if there is one, with a progress bar and a log."""
        trainer = Trainer(self.recipe, self.load_tokens("train"), fingerprint(self.tokenizer))
        if self.checkpoint.exists():
            trainer.load(self.checkpoint)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with _Progress(self.log) as progress:
            run(
                trainer,
                budget,
                checkpoint=self.checkpoint,
                checkpoint_seconds=_CHECKPOINT_SECONDS,
                clock=time.monotonic,
                observe=progress.observe,
            )

    def export(self, folder: Path) -> None:
        """Write the last checkpoint as a folder for inference."""
        export(self.load_network(), self.tokenizer, folder)

    def load_tokens(self, name: str) -> tokens.Tokens:
        """The token array of a set."""
        return tokens.load_tokens(self.tokens, name, fingerprint(self.tokenizer))

    def load_network(self) -> Network:
        """The network as the last checkpoint has it."""
        state = load_state(self.checkpoint, self.recipe, fingerprint(self.tokenizer))
        network = Network(self.recipe.network)
        network.load_state_dict(state["network"])
        return network

    def describe(self, folder: Path) -> None:
        """Evaluate an exported folder and write its model card."""
        config = self.recipe.network
        documents = corpus.read_documents(self.corpus / "validation.jsonl")
        evaluation = Evaluator(folder).evaluate(
            self.load_tokens("validation"), documents, config.max_position_embeddings
        )
        state = load_state(self.checkpoint, self.recipe, fingerprint(self.tokenizer))
        _, num_tokens, seconds = state["counters"]
        num_parameters = sum(weight.numel() for weight in state["network"].values())
        provenance = Provenance(
            num_parameters=num_parameters,
            num_active_parameters=count_active_parameters(config, num_parameters),
            tokens=num_tokens,
            seconds=seconds,
            threads=torch.get_num_threads(),
            corpus_tokens=len(self.load_tokens("train")),
            licences=json.loads((self.corpus / "licences.json").read_text()),
        )
        (folder / "README.md").write_text(model_card(self.recipe, provenance, evaluation))


class _Progress:
    """Shows a bar with loss, tokens/s and time left, and appends every step to a log.

    Steps that a killed run took after its last checkpoint are taken, and logged, again.
    """

    def __init__(self, log: Path) -> None:
        self._log = log.open("a")
        self._bar = tqdm(total=_PROGRESS_STEPS, bar_format="{percentage:5.1f}% {bar} {remaining} left{postfix}")
        self._loss: float | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._log.close()

    def observe(self, report: StepReport) -> None:
        if self._loss is None:
            # What earlier runs spent is no guide to this one's speed.
            self._bar.initial = self._bar.n = round(report.spent * _PROGRESS_STEPS)
        self._loss = report.loss if self._loss is None else 0.95 * self._loss + 0.05 * report.loss
        speed = report.tokens / report.seconds
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(round(report.spent * _PROGRESS_STEPS) - self._bar.n)
        self._log.write(json.dumps(asdict(report)) + "\n")
        self._log.flush()


def _read_all(wheels: dict[str, Path]) -> Iterator[sources.SourceFile]:
    yield from sources.read_stdlib()
    for name, path in wheels.items():
        yield from sources.read_wheel(name, path)


def _texts(documents: list[corpus.Document], characters: int) -> Iterator[str]:
    for document in documents:
        if characters < 0:
            return
        yield from document.turns
        characters -= sum(map(len, document.turns))


def _write_last(path: Path, value: object) -> None:
    """Write the file whose existence says that a step is done."""
    path.write_text(json.dumps(value, indent=2) + "\n")
