"""The scheduler under random workloads: every request gets the tokens that it gets alone.

The fake model is a function of the tokens so far, so its plain loop (`tests.fakes.generate`) is the oracle; the
harness checks invariants and limits after every step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from shoal.scheduler.config import CacheGroup, Config
from shoal.scheduler.errors import ContextLengthError, QueueFullError
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import FinishReason, SamplingParams, SchedulerOutput, SchedulerStats
from shoal.scheduler.policies import POLICIES, Policy
from shoal.scheduler.policies.fair import VirtualTokenCounter
from shoal.scheduler.step_record import StepRecord
from tests.examples import examples
from tests.fakes import ALL, Draft, Harness, InjectedError, digest, generate, hashed
from tests.scheduler.made_anew import ANEW

VOCAB_SIZE = 4  # so small that prompts share prefixes, stop tokens appear and drafted tokens are accepted
CHOOSE = hashed(VOCAB_SIZE)
# A step takes a second: waiting must matter within the length of a run.
KNOBS = {
    "ageing_seconds": 10,
    "ageing_tokens": 0.5,
    "ttft_slo_ms": 5000,
    "tpot_slo_ms": 2000,
    "static_timeout_seconds": 3,
}
# With its default lead, `fair` pauses no request in such a short run.
CASES = [
    *(pytest.param(name, policy.Knobs.select(KNOBS), id=name) for name, policy in POLICIES.items()),
    *(pytest.param("fair", VirtualTokenCounter.Knobs(fair_lead=lead), id=f"fair-{lead}") for lead in (1, 10)),
]
# A third of them see all; windows and chunks are shorter than most texts, in the blocks' sizes and across them.
CACHE_GROUPS = st.one_of(
    st.just(CacheGroup()),
    st.builds(CacheGroup, window=st.integers(1, 20)),
    st.builds(CacheGroup, chunk=st.integers(1, 20)),
)


@dataclass
class Asked:
    """A request, as the test asked for it."""

    prompt: list[int]
    params: SamplingParams


def noisy_drafts(longest: int, salt: int) -> Draft:
    """Proposes 0 to `longest` tokens, each of them right or wrong; the same context always has the same draft."""

    def draft(request_id: str, context: list[int]) -> list[int]:
        noise = digest(context, salt)
        drafted: list[int] = []
        for index in range(noise % (longest + 1)):
            is_wrong = noise >> (8 + index) & 3 == 0
            drafted.append((CHOOSE(request_id, context + drafted) + is_wrong) % VOCAB_SIZE)
        return drafted

    return draft


def check_answer(harness: Harness, request_id: str, asked: Asked, is_at_fault: bool) -> None:
    """A request that ended by itself has the tokens that it gets alone; any other has the first of them."""
    reason, token_ids = harness.finish_reasons[request_id], harness.token_ids[request_id]
    alone = generate(CHOOSE, request_id, asked.prompt, asked.params)
    if reason in (FinishReason.ABORT, FinishReason.ERROR):
        assert token_ids == alone[: len(token_ids)]
        assert reason is FinishReason.ABORT or is_at_fault
        return
    assert not is_at_fault
    assert token_ids == alone
    is_stopped = alone and alone[-1] in asked.params.stop_token_ids
    assert reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
    if asked.params.num_logprobs is not None:
        text = list(enumerate(asked.prompt + alone))
        scored = harness.prompt_logprobs[request_id] + harness.logprobs[request_id]
        assert [(entry.rank, -entry.logprob) for entry in scored] == text[1:]


class Workload(RuleBasedStateMachine):
    """Requests arrive, are aborted and fail while the engine steps."""

    policy: str
    knobs: Config

    @initialize(
        num_blocks=st.integers(1, 12),
        groups=st.just(ALL) | st.lists(CACHE_GROUPS, min_size=1, max_size=3),
        block_size=st.integers(1, 16),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 20),
        max_chunk_tokens=st.integers(1, 12),
        max_num_waiting=st.integers(0, 8),
        enable_prefix_caching=st.booleans(),
        longest_draft=st.integers(0, 4),
        salt=st.integers(0, 99),
    )
    def start(
        self,
        *,
        num_blocks: int,
        groups: Sequence[CacheGroup],
        longest_draft: int,
        salt: int,
        spare_budget: int,
        max_num_seqs: int,
        **limits: int,
    ) -> None:
        self.harness = Harness(
            CHOOSE,
            noisy_drafts(longest_draft, salt) if longest_draft else None,
            max_model_len=40,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            policy=self.policy,
            knobs=self.knobs,
            groups=groups,
            num_blocks=num_blocks * len(groups),
            **limits,
        )
        self.asked: dict[str, Asked] = {}
        self.broken: set[str] = set()  # requests whose every step fails
        self.unwell: set[str] = set()  # requests whose own result is an error
        self.fails_next = False
        self.harness.executor.fail = self._fail
        self.harness.executor.error = lambda share: "Injected" if share.request_id in self.unwell else None
        self.num_steps = 0

    def _fail(self, output: SchedulerOutput) -> None:
        fails_now, self.fails_next = self.fails_next, False
        if fails_now or any(share.request_id in self.broken for share in output.scheduled):
            raise InjectedError("step")

    @rule(
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
        repeats=st.integers(0, 20),
        max_tokens=st.integers(0, 12),
        stop_token_ids=st.frozensets(st.integers(0, VOCAB_SIZE + 2), max_size=1),
        is_scored=st.booleans(),
        scheduling=st.fixed_dictionaries(
            {"client": st.sampled_from("ab"), "priority": st.integers(-3, 3), "ttft_slo_ms": st.none() | st.just(100.0)}
        ),
    )
    def add(
        self,
        *,
        prompt: list[int],
        repeats: int,
        max_tokens: int,
        stop_token_ids: frozenset[int],
        is_scored: bool,
        scheduling: dict[str, object],
    ) -> None:
        prompt = [0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 3, 1, 3][:repeats] + prompt
        count = 0 if is_scored else None
        others = {"stop_token_ids": stop_token_ids, "num_logprobs": count, "num_prompt_logprobs": count} | scheduling
        request_id = f"r{len(self.asked)}"
        config, num_unfinished = self.harness.config, self.harness.scheduler.num_unfinished
        num_tokens = len(prompt) + max_tokens
        num_computed = num_tokens - (max_tokens > 0)
        fits = num_tokens <= 40 and config.most_blocks(num_computed) <= config.num_blocks
        if all(group.sees_all for group in config.cache_groups):
            num_slots = config.num_blocks // len(config.cache_groups) * config.block_size
            assert fits == (num_tokens <= 40 and num_computed <= num_slots)
        has_room = num_unfinished < config.max_num_seqs + config.max_num_waiting
        try:
            request = self.harness.add(request_id, prompt, max_tokens, **others)
        except ContextLengthError:
            assert not fits
        except QueueFullError:
            assert fits
            assert not has_room
        else:
            assert fits
            assert has_room
            self.asked[request_id] = Asked(prompt, request.params)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.num_steps += 1
            self.harness.step()

    @rule()
    def forget_prefixes(self) -> None:
        self.harness.scheduler.kv_cache.pool.forget()

    @property
    def unfinished(self) -> list[str]:
        return sorted(self.asked.keys() - self.harness.finish_reasons.keys())

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.harness.abort(data.draw(st.sampled_from(self.unfinished)))
        check_invariants(self.harness.scheduler)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort_during_a_step(self, data: st.DataObject) -> None:
        scheduler, executor = self.harness.scheduler, self.harness.executor
        request_id = data.draw(st.sampled_from(self.unfinished))

        def abort_and_pass(output: SchedulerOutput) -> None:
            executor.fail = self._fail
            self.harness.abort(request_id)
            check_invariants(scheduler)
            self._fail(output)

        executor.fail = abort_and_pass
        self.step(1)
        executor.fail = self._fail

    @rule()
    def fail_once(self) -> None:
        self.fails_next = True

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data(), is_step=st.booleans())
    def fail_for_one(self, data: st.DataObject, is_step: bool) -> None:
        (self.broken if is_step else self.unwell).add(data.draw(st.sampled_from(self.unfinished)))

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        # Under fcfs the first request advances by a token in every step, and is never a victim.  Under other policies
        # the first request may change, but not often, and a static batch waits until it is formed.
        bound = sum(len(asked.prompt) + asked.params.max_tokens for asked in self.asked.values())
        self.harness.drain(max_steps=bound if self.policy == "fcfs" else 3 * (bound + len(self.asked)))
        for request_id, asked in self.asked.items():
            check_answer(self.harness, request_id, asked, request_id in self.broken | self.unwell)


@pytest.mark.parametrize(("policy", "knobs"), CASES)
def test_every_request_gets_what_it_gets_alone(policy: str, knobs: Config) -> None:
    run_state_machine_as_test(
        type("Workload", (Workload,), {"policy": policy, "knobs": knobs}),
        settings=settings(
            max_examples=examples(100 if policy == "fcfs" else 30),
            stateful_step_count=40,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


# -- busy workloads --------------------------------------------------------------------------------------------------


def busy_harness(rng: random.Random, policy: str | type[Policy], knobs: Config) -> Harness:
    """Few rows and few blocks, hardly more than the largest request needs."""
    block_size, max_num_seqs = rng.randint(1, 4), rng.randint(1, 4)
    groups = rng.choice([[CacheGroup()], [CacheGroup(), CacheGroup(window=rng.randint(1, 9))], [CacheGroup(chunk=6)]])
    max_chunk_tokens = rng.randint(2, 12)
    largest = sum(group.most_blocks(24, block_size, max_chunk_tokens) for group in groups)
    return Harness(
        CHOOSE,
        noisy_drafts(rng.randint(1, 4), rng.randint(0, 99)) if rng.random() < 0.5 else None,
        policy=policy,
        knobs=knobs,
        groups=groups,
        num_blocks=int(largest * rng.choice([1, 1.25, 2.5])),
        block_size=block_size,
        max_model_len=24,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.randint(0, 12),
        max_chunk_tokens=max_chunk_tokens,
        enable_prefix_caching=rng.random() < 0.5,
    )


def ask(rng: random.Random, harness: Harness, request_id: str) -> Asked:
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))]
    others: dict[str, object] = {
        "stop_token_ids": frozenset({rng.randrange(VOCAB_SIZE)} if rng.random() < 0.2 else ()),
        "client": rng.choice("abcd"),
        "priority": rng.randint(-3, 3),
        "ttft_slo_ms": rng.choice([None, 100.0, 20_000.0]),
    }
    return Asked(prompt, harness.add(request_id, prompt, rng.randint(0, 12), **others).params)


def run_busily(rng: random.Random, harness: Harness) -> int:
    """Requests come in bursts; some are aborted, a few are at fault, and a step may fail for once.

    Returns:
        Over all steps, the number of padding rows after it.
    """
    num_padding = 0
    asked: dict[str, Asked] = {}
    at_fault: set[str] = set()
    spoilt: set[str] = set()  # at fault after they were answered, as padding
    fails_now = False

    def fail(output: SchedulerOutput) -> None:
        nonlocal fails_now
        fails, fails_now = fails_now, False
        if fails or any(share.request_id in at_fault | spoilt for share in output.scheduled):
            raise InjectedError("step")

    harness.executor.fail = fail
    for _ in range(40):
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            request_id = f"r{len(asked)}"
            asked[request_id] = ask(rng, harness, request_id)
        unfinished = sorted(asked.keys() - harness.finish_reasons.keys())
        if unfinished and rng.random() < 0.1:
            harness.abort(rng.choice(unfinished))
            check_invariants(harness.scheduler)
        elif unfinished and rng.random() < 0.05:
            at_fault.add(rng.choice(unfinished))
        spoilt |= {request_id for request_id in harness.scheduler.padding if rng.random() < 0.02}
        fails_now = rng.random() < 0.05
        harness.step()
        num_padding += len(harness.scheduler.padding)
    harness.drain(max_steps=3 * sum(len(one.prompt) + one.params.max_tokens + 1 for one in asked.values()))
    for request_id, one in asked.items():
        check_answer(harness, request_id, one, request_id in at_fault)
    return num_padding


@pytest.mark.parametrize(("policy", "knobs"), CASES)
def test_under_load_every_request_gets_what_it_gets_alone(policy: str, knobs: Config) -> None:
    num_preemptions = num_padding = num_pauses = 0

    @settings(max_examples=examples(60), derandomize=True)
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        nonlocal num_preemptions, num_padding, num_pauses
        rng = random.Random(seed)
        harness = busy_harness(rng, policy, knobs)
        num_padding += run_busily(rng, harness)
        num_preemptions += harness.scheduler.stats().num_preemptions
        num_pauses += harness.num_pauses

    run()
    assert num_preemptions > examples(20), "blocks were meant to be few"
    assert (num_padding > examples(200)) == (policy == "static")
    assert (num_pauses > examples(200)) == (isinstance(knobs, VirtualTokenCounter.Knobs) and knobs.fair_lead <= 10)


@pytest.mark.parametrize(("policy", "knobs"), CASES)
def test_an_order_that_is_kept_is_the_one_made_anew(policy: str, knobs: Config) -> None:
    """Ties and all: every step is the same, and as many requests are deferred."""

    @settings(max_examples=examples(100), derandomize=True)
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        histories = []
        for kind in (POLICIES[policy], ANEW[policy]):
            rng = random.Random(seed)
            harness = busy_harness(rng, kind, knobs)
            steps: list[tuple[StepRecord, SchedulerStats]] = []
            harness.engine.observers = [
                lambda record, steps=steps, harness=harness: steps.append((record, harness.scheduler.stats()))
            ]
            run_busily(rng, harness)
            histories.append((steps, harness.executor.steps))
        assert histories[0] == histories[1]

    run()
