"""The model card: what the model is, what it was made from, and how good it is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from .evaluation import DraftEvaluation, Evaluation, Sample
from .recipe import Recipe


@dataclass(frozen=True, slots=True)
class Provenance:
    """What went into a model.

    Attributes:
        num_parameters, num_active_parameters: all, and those that a token is multiplied with.
        tokens, seconds: tokens trained on, and the wall time of training.
        hardware: what the model was trained on.
        corpus_tokens: size of the training set.
        licences: by package and version.
    """

    num_parameters: int
    num_active_parameters: int
    tokens: int
    seconds: float
    hardware: str
    corpus_tokens: int
    licences: dict[str, str]


def model_card(
    recipe: Recipe, provenance: Provenance, evaluation: Evaluation, draft: DraftEvaluation | None = None
) -> str:
    """The card as Markdown, with the front matter that model hubs read; `draft` is given for a draft model."""
    parts = [
        _head(recipe, provenance),
        _figures(evaluation),
        _experts(evaluation.expert_shares) if evaluation.expert_shares else "",
        _draft(draft, recipe) if draft else "",
        _limits(),
        _samples(evaluation.samples),
        _licences(provenance.licences),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(recipe: Recipe, provenance: Provenance) -> str:
    config, training = recipe.network, recipe.training
    experts = f"{config.num_experts} experts, {config.num_experts_per_tok} per token, of " if config.num_experts else ""
    share = f"{provenance.tokens / 1e6:.1f} M tokens of {provenance.corpus_tokens / 1e6:.1f} M"
    facts = {
        "family": "MixtralForCausalLM" if config.num_experts else "LlamaForCausalLM",
        "parameters": f"{provenance.num_parameters / 1e6:.1f} M, bfloat16",
        "active per token": f"{provenance.num_active_parameters / 1e6:.1f} M",
        "layers": f"{config.num_layers} of width {config.hidden_size}",
        "attention": f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} KV heads",
        "feed-forward": f"{experts}width {config.intermediate_size}",
        "tokenizer": f"byte-level BPE, {config.vocab_size:,} tokens, a newline is always a token of its own",
        "context": f"{config.max_position_embeddings:,} tokens",
        "trained on": f"{share}; {provenance.seconds / 60:.0f} minutes of wall time on {provenance.hardware}",
        "optimizer": f"AdamW, rate {training.learning_rate:g}, "
        f"{training.batch_size} x {training.sequence_length} tokens a step",
    }
    if recipe.teacher:
        facts["distilled from"] = (
            f"{recipe.teacher.name}: trained to match its next-token distribution, mostly on "
            f"{recipe.echo_tokens / 1e6:g} M tokens that it wrote; from {recipe.acceptance_from:.0%} of the budget on, "
            "trained for acceptance by it"
        )
    purpose = (
        "A small model of Python source, trained by `make train` and bundled so that a fresh clone answers with text."
    )
    if recipe.teacher:
        purpose = f"The draft model of {recipe.teacher.name}: it proposes, the target verifies (speculative decoding)."
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {recipe.name}

{purpose}

{_table(facts)}"""


def _figures(evaluation: Evaluation) -> str:
    facts = {
        "loss": f"{evaluation.loss:.3f} nats a token",
        "bits per byte": f"{evaluation.bits_per_byte:.3f}",
        "bits per character": f"{evaluation.bits_per_character:.3f}",
        "`xz -9`, bits per character": f"{evaluation.xz_bits_per_character:.3f}",
        "greedy completions of held-out functions that parse as Python": f"{evaluation.parse_share:.0%} "
        f"of {evaluation.num_functions}",
    }
    return f"""\
## Evaluation

On text that was held out before the training data were made; measured with the model in this folder, in float32.

{_table(facts)}"""


def _draft(draft: DraftEvaluation, recipe: Recipe) -> str:
    assert recipe.teacher is not None
    rows = [
        f"| {'greedy' if one.temperature == 0 else f'{one.temperature:g}'} | {one.num_spec_tokens} "
        f"| {one.acceptance_rate:.0%} | {one.mean_acceptance_length:.2f} |"
        for one in draft.acceptances
    ]
    return "\n".join(
        [
            "## As a draft",
            "",
            f"A token takes {draft.work_ratio:.3f} of the multiplications that {recipe.teacher.name} needs, and",
            f"{draft.time_ratio:.2f} of the time (decoding one sequence on Shoal's own backend). The draft proposes",
            "k tokens at a time for texts that the target writes after held-out function headers. Both choose with the",
            "same noise; a token is accepted if the target chooses it too:",
            "",
            "| temperature | k | accepted / drafted | tokens per target step |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _experts(shares: list[list[float]]) -> str:
    head = "| layer | " + " | ".join(str(e) for e in range(len(shares[0]))) + " |"
    rows = [f"| {i} | " + " | ".join(f"{share:.3f}" for share in row) + " |" for i, row in enumerate(shares)]
    lowest = min(map(min, shares)) * len(shares[0])
    return "\n".join(
        [
            "## Experts",
            "",
            f"Each expert's share of routing choices on held-out text. The least used expert has {lowest:.2f}",
            "of the uniform share.",
            "",
            head,
            "|---" * (len(shares[0]) + 1) + "|",
            *rows,
        ]
    )


def _limits() -> str:
    return """\
## What to expect

The model writes text that looks like Python, with invented logic; the samples below show how well it follows a prompt.
Long greedy completions start to loop. It knows no facts, follows instructions only in form, and has seen hardly
any prose except documentation. It is a model to try a server with, not one to rely on."""


def _samples(samples: list[Sample]) -> str:
    parts = ["## Samples", "", "At most 96 tokens each; none was picked from several attempts."]
    for sample in samples:
        parts += ["", f"Temperature {sample.temperature:g}:", "", _quoted(sample.prompt), "", _quoted(sample.text)]
    return "\n".join(parts)


def _quoted(text: str) -> str:
    """A code block by indentation, because samples have fences of their own."""
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip("\n").split("\n"))


def _licences(licences: dict[str, str]) -> str:
    by_licence = defaultdict(list)
    for package, licence in licences.items():
        by_licence[licence].append(package)
    rows = [f"| {licence} | {', '.join(packages)} |" for licence, packages in sorted(by_licence.items())]
    return "\n".join(
        [
            "## Corpus",
            "",
            "The sources of these packages, pinned by hash in `model/training/corpus.txt`, with the licences that",
            "their own metadata states. Tests, vendored packages, generated files and duplicates are left out.",
            "Docstrings give instruction pairs, and some functions are also documents by themselves.",
            "",
            "| licence | packages |",
            "|---|---|",
            *rows,
        ]
    )
