"""The steps of the recipe; each reads what the step before it wrote under the work directory.

    wheels/  ->  corpus/  ->  tokenizer-4096/  ->  tokens-4096/  ->  NAME/checkpoint.pt  ->  the exported folder

A step is skipped when its output exists; to do it again, delete its folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

from shoal.model.checkpoint.load import load_checkpoint
from shoal.scheduler.errors import CheckpointError

from . import corpus, documentation, echo, sources, tokens
from .card import Provenance, model_card
from .cost import create_backend, decode_seconds
from .evaluation import DraftEvaluation, Evaluator
from .export import export
from .network import Network, count_active_parameters, count_parameters, training_dtype
from .prediction import create_network
from .recipe import Budget, Recipe
from .tokenizer import END_OF_TEXT, fingerprint, load_tokenizer, special_id, train_tokenizer
from .trainer import StepReport, Trainer, load_state, run

SETS = ("train", "validation")

_TOKENIZER_CHARACTERS = 20_000_000  # of training text that the merges are learnt from
_CHECKPOINT_SECONDS = 90.0
_PROGRESS_STEPS = 10_000


class Pipeline:
    """The steps over one work directory, for one recipe."""

    def __init__(self, work: Path, recipe: Recipe) -> None:
        self.recipe, self._work = recipe, work
        self.wheels, self.corpus = work / "wheels", work / "corpus"
        self.tokenizer = work / f"tokenizer-{recipe.network.vocab_size}" / "tokenizer.json"
        self.tokens = work / f"tokens-{recipe.network.vocab_size}"
        self.checkpoint = work / recipe.name / "checkpoint.pt"
        self.log = work / recipe.name / "log.jsonl"
        self.provenance = work / recipe.name / "provenance.json"

    def make_corpus(self) -> None:
        """Download and verify the packages; clean, de-duplicate, cap and split; note the licences."""
        if (self.corpus / "licences.json").exists():
            return
        pins = sources.read_pins()
        sources.download(self.wheels)
        documentation.download(self.wheels)
        wheels, pages = sources.verify(self.wheels, pins), documentation.verify(self.wheels)
        self.corpus.mkdir(parents=True, exist_ok=True)
        for name, documents in zip(SETS, corpus.build(_read_all(wheels, pages)), strict=True):
            corpus.write_documents(documents, self.corpus / f"{name}.jsonl")
        licences = {
            sources.STDLIB: sources.stdlib_licence(),
            f"{documentation.PIN.name} {documentation.PIN.version}": documentation.LICENCE,
        }
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
        """Encode both sets; of the validation set only whole files, because the other documents repeat them."""
        if (self.tokens / "tokenizer.json").exists():
            return
        tokenizer = load_tokenizer(self.tokenizer)
        train, held_out = (corpus.read_documents(self.corpus / f"{name}.jsonl") for name in SETS)
        documents = {"train": train, "validation": [document for document in held_out if document.is_file]}
        arrays = {name: tokens.encode_documents(documents[name], tokenizer) for name in SETS}
        tokens.save_tokens(self.tokens, arrays, fingerprint(self.tokenizer))

    def train(self, budget: Budget) -> None:
        """Train up to the budget, from the last checkpoint if there is one, with a progress bar and a log."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher, data = None, self.load_tokens("train")
        if self.recipe.teacher is not None:
            teacher = Pipeline(self._work, self.recipe.teacher).load_network(training_dtype(device))
            echoes = self._make_echoes(self.recipe.teacher, self.recipe.echo_tokens, data, device.type)
            times = max(1, len(data) // len(echoes))
            data = np.concatenate([np.tile(echoes, times), data[: times * len(echoes) // 2]])
        trainer = Trainer(self.recipe, data, fingerprint(self.tokenizer), device, teacher)
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
        """Write the last checkpoint as a folder for inference, and note how it was trained."""
        export(self.load_network(), self.tokenizer, folder)
        state = load_state(self.checkpoint, self.recipe, fingerprint(self.tokenizer))
        _, num_tokens, seconds = state["counters"]
        notes = {"tokens": num_tokens, "seconds": seconds, "hardware": state["hardware"]}
        self.provenance.write_text(json.dumps(notes, indent=2) + "\n")

    def load_tokens(self, name: str) -> tokens.Tokens:
        """The token array of a set."""
        return tokens.load_tokens(self.tokens, name, fingerprint(self.tokenizer))

    def load_network(self, dtype: torch.dtype = torch.float32) -> Network:
        """The network as the last checkpoint has it, on the CPU, with products in `dtype`."""
        state = load_state(self.checkpoint, self.recipe, fingerprint(self.tokenizer))
        network = create_network(self.recipe, dtype)
        network.load_state_dict(state["network"])
        return network

    def _make_echoes(self, target: Recipe, num_tokens: int, data: tokens.Tokens, device: str) -> tokens.Tokens:
        """Have the trained target write text for its draft, unless it has done so."""
        path = self.checkpoint.parent / "echoes.npy"
        if not path.exists():
            with TemporaryDirectory() as folder:
                Pipeline(self._work, target).export(Path(folder))
                record = load_checkpoint(Path(folder))
            length = min(echo.LENGTH, record.config.max_position_embeddings)
            end_of_text = special_id(load_tokenizer(self.tokenizer), END_OF_TEXT)
            with tqdm(total=num_tokens, unit="tok", unit_scale=True, desc="the target writes") as bar:
                echoes = echo.write_echoes(
                    lambda num_blocks: create_backend(record, num_blocks, echo.BLOCK_SIZE, device),
                    data,
                    num_tokens,
                    num_rows=echo.NUM_ROWS[device],
                    length=length,
                    end_of_text=end_of_text,
                    observe=lambda done: _advance(bar, done),
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            tokens.save_array(path, echoes)
        written: tokens.Tokens = np.load(path)
        return written

    def describe(self, folder: Path) -> None:
        """Evaluate an exported folder and write its model card, wherever it was trained.

        A draft is evaluated with its exported target in the folder next to it; CheckpointError if that is missing.
        """
        if not self.provenance.exists():
            raise CheckpointError(f"{self.provenance} is missing: export the model first", param=self.provenance.name)
        config = self.recipe.network
        documents = corpus.read_documents(self.corpus / "validation.jsonl")
        evaluator = Evaluator(folder)
        evaluation = evaluator.evaluate(self.load_tokens("validation"), documents, config.max_position_embeddings)
        draft = self._evaluate_draft(evaluator, folder, documents) if self.recipe.teacher else None
        provenance = Provenance(
            num_parameters=count_parameters(config),
            num_active_parameters=count_active_parameters(config),
            **json.loads(self.provenance.read_text()),
            corpus_tokens=len(self.load_tokens("train")),
            licences=json.loads((self.corpus / "licences.json").read_text()),
        )
        (folder / "README.md").write_text(model_card(self.recipe, provenance, evaluation, draft))

    def _evaluate_draft(self, evaluator: Evaluator, folder: Path, documents: list[corpus.Document]) -> DraftEvaluation:
        assert self.recipe.teacher is not None
        target = folder.parent / self.recipe.teacher.name
        if not (target / "config.json").exists():
            raise CheckpointError(f"{target} is missing: export the target first", param=self.recipe.teacher.name)
        draft_seconds, target_seconds = decode_seconds(folder, target)
        works = [count_active_parameters(recipe.network) for recipe in (self.recipe, self.recipe.teacher)]
        return DraftEvaluation(
            acceptances=evaluator.evaluate_draft(Evaluator(target), documents),
            work_ratio=works[0] / works[1],
            time_ratio=draft_seconds / target_seconds,
        )


class _Progress:
    """Shows a bar with loss, tokens/s and time left, and appends every step to a log.

    Steps that a killed run took after its last checkpoint are repeated, and logged again.
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


def _advance(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _read_all(wheels: dict[str, Path], pages: Path) -> Iterator[sources.SourceFile]:
    yield from sources.read_stdlib()
    yield from documentation.read(pages)
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
