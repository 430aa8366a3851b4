"""The whole recipe on a corpus of four files, and how its results are judged."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from shoal.model.training import corpus, documentation, evaluation, sources
from shoal.model.training.corpus import Document
from shoal.model.training.evaluation import completes_function, held_out_headers
from shoal.model.training.network import Network, count_active_parameters, count_parameters
from shoal.model.training.pipeline import Pipeline
from shoal.model.training.recipe import Budget, Recipe
from shoal.model.training.sources import SourceFile
from shoal.scheduler.errors import CheckpointError

HEADER = 'def f(x):\n    """Do it."""\n'


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """No packages, a library of one module and its parts, half of it held out, and short samples."""

    def files() -> Iterator[SourceFile]:
        for name in ("decoder", "encoder", "scanner", "tool"):
            yield SourceFile(sources.STDLIB, f"json/{name}.py", (Path(json.__file__).parent / f"{name}.py").read_text())

    monkeypatch.setattr(sources, "read_pins", list)
    monkeypatch.setattr(sources, "download", lambda wheels: None)
    monkeypatch.setattr(sources, "read_stdlib", files)
    monkeypatch.setattr(documentation, "download", lambda folder: None)
    monkeypatch.setattr(documentation, "verify", lambda folder: folder)
    monkeypatch.setattr(documentation, "read", lambda path: iter(()))
    monkeypatch.setattr(corpus, "is_validation", lambda file: file.path == "json/decoder.py")
    monkeypatch.setattr(evaluation, "_SAMPLE_TOKENS", 4)
    monkeypatch.setattr(evaluation, "_NUM_FUNCTIONS", 2)
    monkeypatch.setattr(evaluation, "_FUNCTION_TOKENS", 8)


@pytest.mark.usefixtures("small_world")
def test_the_recipe_from_corpus_to_card(tiny_recipe: Recipe, tmp_path: Path) -> None:
    work, folder = tmp_path / "work", tmp_path / "model"
    recipe = replace(tiny_recipe, network=replace(tiny_recipe.network, vocab_size=400))

    def everything(pipeline: Pipeline) -> None:
        pipeline.make_corpus()
        pipeline.make_tokenizer()
        pipeline.make_tokens()
        pipeline.train(Budget(tokens=5 * 64))

    everything(Pipeline(work, recipe))
    written = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    everything(Pipeline(work, recipe))
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()} == written

    pipeline = Pipeline(work, recipe)
    with pytest.raises(CheckpointError, match=r"provenance\.json is missing: export the model first"):
        pipeline.describe(folder)
    pipeline.export(folder)
    pipeline.checkpoint.rename(tmp_path / "elsewhere")  # where a model was trained is not where it is described
    pipeline.describe(folder)
    (tmp_path / "elsewhere").rename(pipeline.checkpoint)
    card = (folder / "README.md").read_text()
    assert f"| trained on | 0.0 M tokens of {len(pipeline.load_tokens('train')) / 1e6:.1f} M" in card
    assert "PSF-2.0" in card
    assert card.count("Temperature 0:") == card.count("Temperature 0.8:") == 10
    assert ("## Experts" in card) == bool(recipe.network.num_experts)
    loss = float(card.split("| loss | ")[1].split()[0])
    network = pipeline.load_network()
    hub = AutoTokenizer.from_pretrained(folder)
    assert len(hub) == network.config.vocab_size
    assert 0 < loss < 7


@pytest.mark.usefixtures("small_world")
def test_a_draft_is_distilled_and_judged_beside_its_target(tiny_recipe: Recipe, tmp_path: Path) -> None:
    network = replace(tiny_recipe.network, vocab_size=400)
    target = replace(tiny_recipe, name="target", network=network)
    thin = replace(network, num_layers=1, num_experts=0, tie_word_embeddings=False)
    draft = replace(tiny_recipe, name="draft", network=thin, teacher=target, echo_tokens=5000)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Pipeline(tmp_path, draft).train(Budget(tokens=64))
    for recipe in (target, draft):
        pipeline = Pipeline(tmp_path, recipe)
        for step in (pipeline.make_corpus, pipeline.make_tokenizer, pipeline.make_tokens):
            step()
        pipeline.train(Budget(tokens=5 * 64))
        pipeline.export(tmp_path / "models" / recipe.name)
    pipeline.describe(tmp_path / "models" / "draft")
    card = (tmp_path / "models" / "draft" / "README.md").read_text()
    assert "| distilled from | target" in card
    rows = [line.split("|")[1:3] for line in card.split("## As a draft")[1].splitlines() if line.count("|") == 5][2:]
    assert [(mode.strip(), int(k)) for mode, k in rows] == list(product(["greedy", "0.8", "1"], [2, 4, 6]))
    for path in (tmp_path / "models" / "target").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="export the target first") as error:
        pipeline.describe(tmp_path / "models" / "draft")
    assert error.value.param == "target"


def test_active_parameters_are_those_of_the_chosen_experts(tiny_recipe: Recipe) -> None:
    dense_config = replace(tiny_recipe.network, num_experts=0)
    total, dense = (
        sum(parameter.numel() for parameter in Network(config).parameters())
        for config in (tiny_recipe.network, dense_config)
    )
    assert count_parameters(tiny_recipe.network) == total
    assert count_active_parameters(replace(dense_config, tie_word_embeddings=False)) == dense
    active = count_active_parameters(tiny_recipe.network)
    if not tiny_recipe.network.num_experts:
        assert active == total == dense
    else:
        one_expert, router = 3 * 32 * 24, 4 * 32
        assert active == dense + tiny_recipe.network.num_layers * (one_expert + router)


@pytest.mark.parametrize(
    ("body", "good"),
    [
        ("    return x\n", True),
        ("    if x:\n        return 1\n\n    return 2\n\n\ndef g(:\n", True),  # only the function itself is judged
        ("    return x\n    cut off in the mid", True),
        ("    if x:\n        return 1\n    elif y:\n        for z in y:\n            ret", True),
        ("    if x:\n\n\ndef g():\n    return 1\n", False),  # it had its say
        ("    return (x\n", False),
        ("        x = 1\n    return x\n", False),
        ("", False),
        ("\n\nclass C:\n    pass\n", False),
    ],
)
def test_a_completion_that_parses(body: str, good: bool) -> None:
    assert completes_function(HEADER, body) == good


def test_held_out_functions_are_asked_for_up_to_their_docstring() -> None:
    text = f"{HEADER}    return 1\n\n\ndef g():\n    return 2\n\n\nclass C:\n    {HEADER!r}\n"
    documents = [Document("p", "a.py", (text,)), Document("p", "a.py#0", ("q", text)), Document("p", "b.txt", (text,))]
    assert list(held_out_headers(documents)) == [HEADER]
