"""What speculation gains: each proposer at each concurrency, with fixed and adaptive lengths, beside the theory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

from bench.speculation.plot import draw
from bench.speculation.serving import Gain, Load, make_prompts
from bench.speculation.theory import MOST_SPEC_TOKENS, Costs, Machine, expert_bytes, speed_up
from bench.table import show
from bench.workload import TimedBackend, make_engine
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelRecord
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.engine import EngineCore
from shoal.server.engine.backends import plan_backend
from shoal.server.sources import load_settings

METHODS = ("draft", "ngram", "self")
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS: tuple[int | None, ...] = (2, 4, 8, None)
TEMPERATURES = (0.0, 0.8)
_REPEATS_OF_ADAPTIVE = 4  # times the pairs of a fixed length, for small differences matter most here


@dataclass(frozen=True)
class Case:
    """What is measured; `num_spec_tokens` is None for adaptive."""

    method: str
    num_spec_tokens: int | None
    temperature: float
    concurrency: int


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
    record, tokenizer = load_checkpoint(checkpoint), Tokenizer.load(checkpoint)
    gains: dict[Case, Gain] = {}
    costs: dict[tuple[str, int], Costs] = {}
    num_cells = len(methods) * len(TEMPERATURES) * len(concurrencies)
    with tqdm(total=num_cells * sum(_num_pairs(length, repeats) for length in LENGTHS), unit="pair") as bar:
        for method in methods:
            prompts = make_prompts(tokenizer, repeats_itself=method == "ngram")
            text = [token for one in prompts for token in one]
            costs |= _measure_costs(checkpoint, method, concurrencies, text, steps=steps, device=device)
            for case, engine in _cases(checkpoint, method, concurrencies, device):
                bar.set_postfix_str(f"{method}, k = {case.num_spec_tokens or 'adaptive'}, {case.concurrency} at once")
                num_pairs = _num_pairs(case.num_spec_tokens, repeats)
                load = Load(engine, prompts, case.concurrency, case.temperature, max_tokens)
                gains[case] = load.measure(num_pairs)
                bar.update(num_pairs)
    verification = [_cost_row(record, method, concurrency, cost) for (method, concurrency), cost in costs.items()]
    show("costs of a step of k + 1 rows a request, relative to one row: v(k); c: of a drafted token", verification)
    rows = [_row(case, gains, costs[case.method, case.concurrency]) for case in gains]
    several = f"median of {repeats} pairs ({_REPEATS_OF_ADAPTIVE * repeats} if adaptive)"
    show(f"speculation: ratio of tokens/s, on over off, {several}; theory and bound from a, v and c", rows)
    if picture is not None:
        draw(picture, checkpoint.name, gains)
    return {"speculation": rows, "speculation_costs": verification}


def _num_pairs(length: int | None, repeats: int) -> int:
    return repeats if length else _REPEATS_OF_ADAPTIVE * repeats


def _cases(
    checkpoint: Path, method: str, concurrencies: Sequence[int], device: str
) -> Iterator[tuple[Case, tuple[EngineCore, TimedBackend]]]:
    """Yield all cases of a method with their engine; the cases of one length share one."""
    for length in LENGTHS:
        engine = make_engine(checkpoint, _arguments(checkpoint, method, device, length))
        for temperature in TEMPERATURES:
            for concurrency in concurrencies:
                yield Case(method, length, temperature, concurrency), engine


def _arguments(checkpoint: Path, method: str, device: str, length: int | None) -> list[str]:
    arguments = ["--model", str(checkpoint), "--speculation", method, "--device", device]
    return arguments if length is None else [*arguments, "--num-spec-tokens", str(length)]


def _measure_costs(
    checkpoint: Path, method: str, concurrencies: Sequence[int], text: list[int], *, steps: int, device: str
) -> dict[tuple[str, int], Costs]:
    record = load_checkpoint(checkpoint)
    settings = load_settings(_arguments(checkpoint, method, device, None))
    plan = plan_backend(settings.engine, settings.cache, record.config)
    guessing = settings.speculation
    draft = load_checkpoint(resolve_checkpoint(guessing.draft_model)) if method == "draft" else None
    layers = (guessing.draft_layers or max(1, record.config.num_layers // 3)) if method == "self" else None
    machine = Machine(record, text, max(concurrencies), create=plan.create, draft=draft, draft_layers=layers)
    return {(method, concurrency): machine.costs(concurrency, steps) for concurrency in concurrencies}


def _cost_row(record: ModelRecord, method: str, concurrency: int, cost: Costs) -> dict[str, object]:
    row: dict[str, object] = {"proposer": method, "concurrency": concurrency, "step us": cost.seconds * 1e6}
    row |= {f"v({k})": cost.verification[k] for k in (1, 2, 3, 4, 6, MOST_SPEC_TOKENS)}
    one = expert_bytes(record, concurrency)
    if one:
        row["expert MB"] = one / 1e6
        row |= {f"experts({k})": expert_bytes(record, concurrency * (k + 1)) / one for k in (1, 4, MOST_SPEC_TOKENS)}
    return row | {"c": cost.drafting}


def _row(case: Case, gains: dict[Case, Gain], cost: Costs) -> dict[str, object]:
    """Return a measurement beside the theory of its length, and the bound: the best theory of the fixed lengths.

    The theory takes the costs of steps from the same runs that it is compared with.  Steps that are timed alone find
    other weights in the CPU's caches than those of a text that is being written.
    """
    gain = gains[case]
    theories = {
        k: _theory(gains[Case(case.method, k, case.temperature, case.concurrency)], k, cost) for k in LENGTHS if k
    }
    bound, best = max((1.0, 0), *((theory, k) for k, theory in theories.items()))
    theory = theories[case.num_spec_tokens] if case.num_spec_tokens else bound
    return {
        "proposer": case.method,
        "k": case.num_spec_tokens or "adaptive",
        "temperature": case.temperature,
        "concurrency": case.concurrency,
        "off tokens/s": gain.off_speed,
        "speed-up": gain.speed_up,
        "theory": theory,
        "gap": gain.speed_up / theory - 1,
        "bound": bound,
        "best k": best,
        "a": gain.token_acceptance,
        "v": gain.verification,
        "steps with one": gain.share_of_steps,
        "accepted/drafted": gain.acceptance_rate,
        "mean k": gain.mean_spec_tokens,
        "tokens/step": gain.mean_acceptance_length,
    }


def _theory(gain: Gain, num_spec_tokens: int, cost: Costs) -> float:
    verification = gain.verification
    if verification is None:
        verification = 1 + gain.share_of_steps * (cost.verification[num_spec_tokens] - 1)
    return speed_up(gain.token_acceptance, num_spec_tokens, verification, cost.drafting, gain.share_of_steps)
