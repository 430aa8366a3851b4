"""Prompts leave steps as long as is wanted on machines of known costs, and change no token whatever steps cost."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.output import SchedulerOutput, StepResult
from shoal.scheduler.pacing import Pacing
from shoal.scheduler.policies import POLICIES
from tests.examples import examples
from tests.fakes import Draft, FakeExecutor, Harness, generate, hashed, params

MOST, LEAST = 512, 16
SECONDS = st.floats(1e-4, 1.0)


@given(target=SECONDS, fixed=SECONDS, per_row=SECONDS, per_token=st.floats(1e-5, 0.1), rows=st.integers(1, 64))
def test_where_costs_are_linear_steps_soon_have_the_wanted_length(
    target: float, fixed: float, per_row: float, per_token: float, rows: int
) -> None:
    pacing = Pacing(target, MOST)
    plain = fixed + per_row * rows
    pacing.learn(rows, 0, plain)
    for _ in range(100):
        pacing.learn(rows, pacing.num_prompt_tokens, plain + pacing.num_prompt_tokens * per_token)
    found, wanted = pacing.num_prompt_tokens, max(target, 2 * plain)
    assert LEAST <= found <= MOST
    assert found == LEAST or plain + found * per_token <= wanted * 1.001
    # Within a token or two: numbers are rounded down.
    assert found == MOST or plain + (found + 2 + 0.01 * found) * per_token >= wanted * 0.95


def test_only_a_step_that_is_full_or_too_long_changes_the_number_and_none_does_without_a_target() -> None:
    pacing = Pacing(0.1, MOST)
    pacing.learn(4, MOST - 1, 0.05)
    pacing.learn(4, 0, 10.0)
    assert pacing.num_prompt_tokens == MOST
    pacing.learn(0, MOST, 10.0)
    assert pacing.num_prompt_tokens == MOST / 2
    unlimited = Pacing(0.0, MOST)
    unlimited.learn(4, MOST, 10.0)
    assert unlimited.num_prompt_tokens == MOST


def test_a_step_that_was_disturbed_is_soon_forgotten() -> None:
    pacing = Pacing(0.2, MOST)
    pacing.learn(4, 0, 0.05)

    def serve(num_steps: int, factor: float = 1.0) -> int:
        for _ in range(num_steps):
            count = pacing.num_prompt_tokens
            pacing.learn(4, count, factor * (0.05 + count * 0.001))
        return pacing.num_prompt_tokens

    assert 145 <= serve(20) <= 150
    assert 70 <= serve(1, factor=20) <= 75
    assert 130 <= serve(4) <= 150


class Machine:
    """Takes virtual time for steps: a fixed part, and more for each row that decodes and each token of a prompt."""

    def __init__(self, draft: Draft | None, cost: tuple[float, float, float], noise: random.Random | None) -> None:
        self.fake = FakeExecutor(4, hashed(50), draft)
        self.cost = cost
        self.noise = noise
        self.now = 0.0
        self.steps: list[tuple[int, int, float]] = []  # rows that decode, tokens of prompts, seconds

    def execute(self, output: SchedulerOutput) -> StepResult:
        counts = [share.num_scheduled_tokens - len(share.spec_token_ids) for share in output.scheduled]
        rows, prompts = counts.count(1), sum(count for count in counts if count > 1)
        fixed, per_row, per_token = self.cost
        seconds = fixed + rows * per_row + prompts * per_token
        self.steps.append((rows, prompts, seconds))
        self.now += seconds * (self.noise.uniform(0.2, 5) if self.noise else 1)
        return self.fake.execute(output)


def serve(machine: Machine, **given: object) -> Harness:
    """An engine on the machine, and requests that come while others decode."""
    harness = Harness(executor=machine, num_blocks=1024, max_model_len=300, max_num_batched_tokens=256, **given)  # type: ignore[arg-type]
    harness.executor = machine.fake
    harness.engine.clock = lambda: machine.now
    rng = random.Random(4)
    for turn in range(400):
        if turn % 10 == 0:
            harness.add(f"r{turn}", [rng.randrange(50) for _ in range(rng.randrange(40, 250))], max_tokens=40)
        harness.step()
    harness.drain()
    return harness


@pytest.mark.parametrize("target_step_ms", [30, 100])
def test_steps_of_a_slow_machine_are_of_the_wanted_length(target_step_ms: float) -> None:
    machine = Machine(None, cost=(0.015, 0.0015, 0.001), noise=None)
    serve(machine, target_step_ms=target_step_ms)
    for rows, prompts, seconds in machine.steps[100:]:
        if rows and prompts:
            plain = 0.015 + 0.0015 * rows
            assert seconds <= 1.25 * max(target_step_ms / 1000, 2 * plain), (rows, prompts)
    mixed = [prompts for rows, prompts, _ in machine.steps[100:] if rows and prompts]
    assert max(mixed) > 10, "prompts get on"


def test_without_a_target_prompts_fill_the_budget() -> None:
    machine = Machine(None, cost=(0.015, 0.0015, 0.001), noise=None)
    serve(machine, target_step_ms=0)
    assert max(prompts for rows, prompts, _ in machine.steps if rows) > 150


@settings(max_examples=examples(30))
@given(policy=st.sampled_from(sorted(POLICIES)), drafts=st.booleans(), seed=st.integers(0, 2**31))
def test_tokens_never_depend_on_what_steps_cost(policy: str, drafts: bool, seed: int) -> None:
    rng = random.Random(seed)
    draft: Draft | None = (lambda _, context: [context[-1], 7, 9]) if drafts else None
    machine = Machine(draft, cost=(0.01, 0.001, 0.001), noise=rng)
    harness = Harness(executor=machine, policy=policy, num_blocks=40, target_step_ms=rng.choice([1, 20, 60]))
    harness.executor = machine.fake
    harness.engine.clock = lambda: machine.now + 0.01 * harness.now  # idle time passes as well
    asked = {f"r{i}": [rng.randrange(50) for _ in range(rng.randrange(1, 60))] for i in range(12)}
    for request_id, prompt in asked.items():
        harness.add(request_id, prompt, max_tokens=12)
        harness.step()
    harness.drain()
    for request_id, prompt in asked.items():
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, prompt, params(12))
