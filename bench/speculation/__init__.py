"""What speculation gains: each proposer at each concurrency, with fixed and adaptive lengths, beside the theory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

from bench.speculation.plot import draw
from bench.speculation.serving import make_prompts, measure
from bench.speculation.theory import BLOCKS_PER_SEQ, MOST_SPEC_TOKENS, Costs, measure_costs, speed_up
from bench.steps import BLOCK_SIZE, expert_weights
from bench.table import show
from bench.workload import make_engine
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelConfig
from shoal.model.speculation.config import SpeculationConfig
from shoal.model.step.batch import Backend
from shoal.model.text.tokenizer import Tokenizer

METHODS = ("draft", "ngram", "self")
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (2, 4, 8)
TEMPERATURES = (0.0, 0.8)
_REPEATS_OF_ADAPTIVE = 4  # times the pairs of a fixed length, for small differences matter most here


def run(
    checkpoint: Path,
    *,
    methods: Sequence[str],
    concurrencies: Sequence[int],
    steps: int,
    repeats: int,
    max_tokens: int,
    device: str,
    picture: Path | None,
) -> dict[str, object]:
    """Measure every combination; print tables, and draw a picture if a path for it is given.

    Args:
        steps: number of steps; each cost is their median.
        repeats: number of pairs of runs; each gain is their median.
        device: device of the models, as `shoal serve --device` takes it.
    """
    config, tokenizer = load_checkpoint(checkpoint).config, Tokenizer.load(checkpoint)
    rows: list[dict[str, Any]] = []
    costs: dict[tuple[str, int], Costs] = {}
    bar = tqdm(total=len(methods) * len(concurrencies) * len(TEMPERATURES) * (len(LENGTHS) + 1), unit="case")
    for method in methods:
        prompts = make_prompts(tokenizer, repeats_itself=method == "ngram")
        text = [token for prompt in prompts for token in prompt]
        costs |= _measure_costs(checkpoint, method, concurrencies, text, steps=steps, device=device)
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
    rows = [row | _theory(row, rows, costs[row["proposer"], row["concurrency"]]) for row in rows]
    verification = [_cost_row(config, method, concurrency, cost) for (method, concurrency), cost in costs.items()]
    show("costs of a step of k + 1 rows a request, relative to one row: v(k); c: of a drafted token", verification)
    several = f"median of {repeats} pairs ({_REPEATS_OF_ADAPTIVE * repeats} if adaptive)"
    show(f"speculation: ratio of tokens/s, on over off, {several}; theory and bound from a, v and c", rows)
    if picture is not None:
        draw(picture, checkpoint.name, rows)
    return {"speculation": rows, "speculation_costs": verification}


def _measure_costs(
    checkpoint: Path, method: str, concurrencies: Sequence[int], text: list[int], *, steps: int, device: str
) -> dict[tuple[str, int], Costs]:
    num_blocks = BLOCKS_PER_SEQ * max(concurrencies)
    arguments = ["--device", device, "--block-size", str(BLOCK_SIZE), "--num-blocks", str(num_blocks)]
    target = make_engine(checkpoint, arguments)[1].backend
    draft: Backend | None = None
    layers = None
    if method == "draft":
        draft = make_engine(resolve_checkpoint(SpeculationConfig().draft_model), arguments)[1].backend
    elif method == "self":
        draft, layers = target, max(1, load_checkpoint(checkpoint).config.num_layers // 3)
    return {
        (method, many): measure_costs(target, draft, layers, text, num_seqs=many, repeats=steps)
        for many in concurrencies
    }


def _cost_row(config: ModelConfig, method: str, concurrency: int, cost: Costs) -> dict[str, object]:
    row: dict[str, object] = {"proposer": method, "concurrency": concurrency, "step us": cost.seconds * 1e6}
    row |= {f"v({k})": cost.verification[k] for k in (1, 2, 3, 4, 6, MOST_SPEC_TOKENS)}
    one = expert_weights(config, concurrency)
    if one:
        row["expert MB"] = 4 * one / 1e6  # of float32
        row |= {f"experts({k})": expert_weights(config, concurrency * (k + 1)) / one for k in (1, 4, MOST_SPEC_TOKENS)}
    return row | {"c": cost.drafting}


def _theory(case: dict[str, Any], rows: list[dict[str, Any]], cost: Costs) -> dict[str, float]:
    """Return the theory of a measurement, its gap, and the bound: the best theory of the fixed lengths.

    The theory takes the costs of steps from the same runs that it is compared with.  Steps that are timed alone find
    other weights in the CPU's caches than those of a text that is being written.
    """
    theories = {}
    for row in rows:
        k, share, v = row["k"], row["steps with one"], row["v"]
        if k != "adaptive" and all(row[name] == case[name] for name in ("proposer", "temperature", "concurrency")):
            v = 1 + share * (cost.verification[k] - 1) if v is None else v
            theories[k] = speed_up(row["a"], k, v, cost.drafting, share)
    bound, best = max((1.0, 0), *((theory, k) for k, theory in theories.items()))
    theory = theories.get(case["k"], bound)
    return {"theory": theory, "gap": case["speed-up"] / theory - 1, "bound": bound, "best k": best}
