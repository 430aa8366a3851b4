"""What speculation gains: each proposer at each concurrency, with fixed and adaptive lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

from bench.speculation.plot import draw
from bench.speculation.serving import make_prompts, measure
from bench.workload import make_engine
from shoal.model.text.tokenizer import Tokenizer
from shoal.terminal import show

METHODS = ("draft", "self", "suffix")
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (2, 4, 8)
TEMPERATURES = (0.0, 0.8)
_REPEATS_OF_ADAPTIVE = 4  # times the pairs of a fixed length, for small differences matter most here


def run(
    checkpoint: Path,
    *,
    methods: Sequence[str],
    concurrencies: Sequence[int],
    repeats: int,
    max_tokens: int,
    device: str,
    picture: Path | None,
    **_: object,
) -> dict[str, object]:
    """Measure every combination; print tables, and draw a picture if a path for it is given.

    Args:
        repeats: number of pairs of runs; each gain is their median.
        device: device of the models, as `shoal serve --device` takes it.
    """
    tokenizer = Tokenizer.load(checkpoint)
    rows: list[dict[str, Any]] = []
    bar = tqdm(total=len(methods) * len(concurrencies) * len(TEMPERATURES) * (len(LENGTHS) + 1), unit="case")
    for method in methods:
        prompts = make_prompts(tokenizer, repeats_itself=method == "suffix")
        for k in (*LENGTHS, "adaptive"):
            length = [] if k == "adaptive" else ["--num-spec-tokens", str(k)]
            engine = make_engine(checkpoint, ["--speculation", method, "--device", device, *length])
            for temperature, concurrency in product(TEMPERATURES, concurrencies):
                case = {"proposer": method, "k": k, "temperature": temperature, "concurrency": concurrency}
                bar.set_postfix(case)
                pairs = _REPEATS_OF_ADAPTIVE * repeats if k == "adaptive" else repeats
                rows.append(
                    case | measure(engine, prompts, concurrency, temperature, max_tokens=max_tokens, repeats=pairs)
                )
                bar.update()
    bar.close()
    several = f"median of {repeats} pairs ({_REPEATS_OF_ADAPTIVE * repeats} if adaptive)"
    show(f"speculation: ratio of tokens/s, on over off, {several}", rows)
    if picture is not None:
        draw(picture, checkpoint.name, rows)
    return {"speculation": rows}
