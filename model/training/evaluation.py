"""Evaluates an exported folder through transformers, with the files as a user gets them."""

from __future__ import annotations

import ast
import lzma
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .acceptance import Acceptance, measure_acceptance
from .corpus import Document, stable_hash
from .tokens import Tokens, count_windows

PROMPTS = (
    "def fibonacci(n):\n",
    "import json\n\ndef read_config(path):\n",
    "class Stack:\n",
    'def is_palindrome(text):\n    """Return True if the text reads the same backwards."""\n',
    "from pathlib import Path\n\n",
    "class Request:\n    def __init__(self, method, url, headers=None):\n",
)
QUESTIONS = (
    "Write a Python function `count_words(text)`. Return the number of words in the text.",
    "Return the largest item of a list. Write it as a Python function named `largest`.",
    "What does this function do?\n```python\ndef close(self):\n    self.file.close()\n    self.closed = True\n```",
    "Write a Python function `parse_line(line)`. Split a line at the first colon and strip both parts.",
)

_BATCH_SIZE = 8
_SAMPLE_TOKENS = 96
_NUM_FUNCTIONS = 96
_FUNCTION_TOKENS = 160
_LONGEST_HEADER = 1200  # characters
_HEADER_TOKENS = 48  # the last ones of a header, which a draft is evaluated on


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt (or a question), a temperature, and what the model wrote."""

    prompt: str
    temperature: float
    text: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of the model card, all on held-out files.

    Attributes:
        loss: nats a token.
        bits_per_byte, bits_per_character: of the text, as UTF-8 and as characters.
        xz_bits_per_character: what `xz -9` needs for the same text.
        expert_shares: by layer, the share of router choices that each expert got; empty for a dense model.
        parse_share: share of greedy completions of held-out functions that parse as Python.
        num_functions: how many functions were completed.
    """

    loss: float
    bits_per_byte: float
    bits_per_character: float
    xz_bits_per_character: float
    expert_shares: list[list[float]]
    parse_share: float
    num_functions: int
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class DraftEvaluation:
    """How useful a draft is to its target.

    Attributes:
        acceptances: over texts that the target writes after held-out function headers.
        work_ratio: multiplications for a token, draft / target, without attention over the context.
        time_ratio: time of a token of one sequence, draft / target, on Shoal's own backend.
    """

    acceptances: list[Acceptance]
    work_ratio: float
    time_ratio: float


class Evaluator:
    """An exported folder, loaded by transformers in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  (the `train` extra; slow)

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._num_experts = getattr(self._model.config, "num_local_experts", 0)

    @torch.inference_mode()
    def evaluate(self, tokens: Tokens, documents: list[Document], length: int) -> Evaluation:
        """Measure all figures over windows of `length` tokens of the validation set, and over its documents."""
        nats, text = 0.0, ""
        choices = torch.zeros(self._model.config.num_hidden_layers, self._num_experts, dtype=torch.int64)
        for windows in _batches_of_windows(tokens, length):
            nats += self._score(windows, choices)
            text += "".join(self._tokenizer.batch_decode(windows[:, 1:], skip_special_tokens=True))
        num_tokens = count_windows(tokens, length) * length
        bits, data = nats / math.log(2), text.encode()
        headers = list(held_out_headers(documents))[:_NUM_FUNCTIONS]
        return Evaluation(
            loss=nats / num_tokens,
            bits_per_byte=bits / len(data),
            bits_per_character=bits / len(text),
            xz_bits_per_character=8 * len(lzma.compress(data, preset=9)) / len(text),
            expert_shares=_shares(choices),
            parse_share=self._parse_share(headers),
            num_functions=len(headers),
            samples=self._samples(),
        )

    @torch.inference_mode()
    def evaluate_draft(self, target: Evaluator, documents: list[Document]) -> list[Acceptance]:
        """How often `target` accepts what this model proposes, after the headers of held-out functions."""
        headers = list(held_out_headers(documents))[:_NUM_FUNCTIONS]
        prompts = [target._tokenizer(header)["input_ids"][-_HEADER_TOKENS:] for header in headers]
        whole = torch.tensor([prompt for prompt in prompts if len(prompt) == _HEADER_TOKENS])
        return measure_acceptance(target._model, self._model, whole, _FUNCTION_TOKENS)

    def _score(self, windows: Tensor, choices: Tensor) -> float:
        """The summed loss; adds how often each layer chose each expert to `choices` [num_layers, num_experts]."""
        extra = {"output_router_logits": True} if self._num_experts else {}
        output = self._model(windows[:, :-1], **extra)
        for layer in range(len(choices) if self._num_experts else 0):
            chosen = output.router_logits[layer].topk(self._model.config.num_experts_per_tok).indices
            choices[layer] += torch.bincount(chosen.flatten(), minlength=self._num_experts)
        return F.cross_entropy(output.logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()

    def _samples(self) -> list[Sample]:
        """Ten prompts, each greedily and at temperature 0.8."""
        chats = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            ).removeprefix(self._tokenizer.bos_token)
            for question in QUESTIONS
        ]
        samples = []
        for temperature in (0.0, 0.8):
            texts = self._complete([*PROMPTS, *chats], _SAMPLE_TOKENS, temperature)
            pairs = zip([*PROMPTS, *QUESTIONS], texts, strict=True)
            samples += [Sample(prompt, temperature, text) for prompt, text in pairs]
        return samples

    def _parse_share(self, headers: list[str]) -> float:
        good = 0
        for start in range(0, len(headers), _BATCH_SIZE):
            some = headers[start : start + _BATCH_SIZE]
            bodies = self._complete(some, _FUNCTION_TOKENS, temperature=0.0)
            good += sum(completes_function(*pair) for pair in zip(some, bodies, strict=True))
        return good / max(1, len(headers))

    def _complete(self, prompts: list[str], max_tokens: int, temperature: float) -> list[str]:
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the folder's own temperature is overruled on purpose
            output = self._model.generate(**inputs, **how, max_new_tokens=max_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        return list(self._tokenizer.batch_decode(new, skip_special_tokens=True))


def _batches_of_windows(tokens: Tokens, length: int) -> Iterator[Tensor]:
    windows = range(count_windows(tokens, length))
    for start in range(0, len(windows), _BATCH_SIZE):
        some = windows[start : start + _BATCH_SIZE]
        rows = [torch.from_numpy(tokens[i * length : (i + 1) * length + 1].astype("int64")) for i in some]
        yield torch.stack(rows)


def _shares(choices: Tensor) -> list[list[float]]:
    if not choices.numel():
        return []
    shares: list[list[float]] = (choices / choices.sum(dim=-1, keepdim=True)).tolist()
    return shares


def held_out_headers(documents: list[Document]) -> Iterator[str]:
    """The `def` line and docstring of the module-level functions of files, in an order by hash."""
    headers = []
    for document in documents:
        if len(document.turns) > 1 or not document.path.endswith(".py"):
            continue
        lines = document.turns[0].split("\n")
        for node in ast.parse(document.turns[0]).body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
                header = "\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + "\n"
                if len(header) <= _LONGEST_HEADER:
                    headers.append(header)
    yield from sorted(headers, key=stable_hash)


def completes_function(header: str, body: str) -> bool:
    """Whether the header and the body's lines parse, up to the end of the function or the last whole line.

    If the limit cut the body off right after the head of a block, that head is ignored.
    """
    lines = body.split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), None)
    kept = lines[: len(lines) - 1 if end is None else end]
    while end is None and kept and kept[-1].endswith(":"):
        kept.pop()
    text = "\n".join(kept)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            ast.parse(f"{header}{text}\n")
    except (SyntaxError, ValueError):
        return False
    return bool(text.strip())
