"""What it costs to have texts keep to a schema, and what is won where tokens are forced."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.timing import in_turns, seconds
from shoal.model.checkpoint.config import load_config
from shoal.model.text.grammar import GrammarCompiler
from shoal.model.text.tokenizer import Tokenizer
from shoal.server.constraints import make_grammar
from shoal.server.llm import LLM, SamplingParams
from shoal.terminal import show

CONCURRENCIES = (1, 32)
Schema = dict[str, Any]
NUMBER: Schema = {"type": "integer", "minimum": 0, "maximum": 9_999_999}
ITEM: Schema = {
    "type": "object",
    "properties": {
        "identifier": {"type": "integer"},
        "description": {"type": "string", "maxLength": 12},
        "is_available": {"type": "boolean"},
    },
    "required": ["identifier", "description", "is_available"],
}
# Of numbers hardly a token is forced; of objects the names are.
SCHEMAS: dict[str, Schema | None] = {
    "no schema": None,
    "numbers": {"type": "array", "items": NUMBER, "minItems": 200},
    "objects": {"type": "array", "items": ITEM, "minItems": 100},
}


def run(checkpoint: Path, *, repeats: int, max_tokens: int, **_: object) -> dict[str, object]:
    """Time the same requests with and without schemas, in turns, and the compiler; print tables."""
    rows: list[dict[str, object]] = []
    with LLM(str(checkpoint), method="off") as llm:
        for concurrency in CONCURRENCIES:
            works = [partial(_tokens_per_second, llm, one, concurrency, max_tokens) for one in SCHEMAS.values()]
            plain, *constrained = in_turns(works, repeats)
            row: dict[str, object] = {"at once": concurrency, "tokens/s": median(plain)}
            for name, speeds in zip(list(SCHEMAS)[1:], constrained, strict=True):
                row[f"{name} / no schema"] = median(one / other for one, other in zip(speeds, plain, strict=True))
            rows.append(row)
    show(f"constraints: tokens/s, {max_tokens} tokens of each, median of {repeats}", rows)
    times = _compiler_times(checkpoint)
    show("constraints: the compiler, in ms", [times])
    return {"constraints": rows, "constraints_compiler": times}


def _tokens_per_second(llm: LLM, schema: Schema | None, concurrency: int, max_tokens: int) -> float:
    fields: dict[str, Any] = {} if schema is None else {"json_schema": schema}
    params = [
        SamplingParams(max_tokens=max_tokens, seed=seed, temperature=0.8, ignore_eos=True, **fields)
        for seed in range(concurrency)
    ]
    began = time.perf_counter()
    outputs = llm.generate(["x = "] * concurrency, params)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - began)


def _compiler_times(checkpoint: Path) -> dict[str, object]:
    config, tokenizer = load_config(checkpoint), Tokenizer.load(checkpoint)
    compiler = GrammarCompiler(lambda: tokenizer, config.vocab_size, config.eos_token_ids)
    grammar = make_grammar("json", json.dumps(SCHEMAS["objects"]))
    first = seconds(partial(compiler.compile, grammar))
    matcher = compiler.compile(grammar)
    return {
        "first grammar": first * 1e3,
        "a grammar": median(seconds(partial(compiler.compile, grammar)) for _ in range(20)) * 1e3,
        "a mask": median(seconds(matcher.compute_bitmask) for _ in range(200)) * 1e3,
    }
