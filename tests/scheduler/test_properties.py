"""The scheduler under random workloads: whatever happens, every request gets what it gets alone.

The fake model is a function of the tokens before, so its plain loop (`tests.fakes.generate`) is the oracle; the
harness checks invariants and limits after every step.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from scheduler.errors import ContextLengthError, QueueFullError
from scheduler.output import FinishReason, SamplingParams, SchedulerOutput
from tests.fakes import Draft, Harness, InjectedError, digest, generate, hashed

VOCAB_SIZE = 4  # so few that prompts share prefixes, stop tokens come up and guesses hit
CHOOSE = hashed(VOCAB_SIZE)


@dataclass
class Asked:
    """What the test knows of a request."""

    prompt: list[int]
    params: SamplingParams
    must_fail: bool = False


def noisy_guesses(longest: int, salt: int) -> Draft:
    """Proposes 0 to `longest` tokens, each of them true or not, at random but always the same."""

    def draft(request_id: str, context: list[int]) -> list[int]:
        noise = digest(context, salt)
        guesses: list[int] = []
        for index in range(noise % (longest + 1)):
            is_wrong = noise >> (8 + index) & 3 == 0
            guesses.append((CHOOSE(request_id, context + guesses) + is_wrong) % VOCAB_SIZE)
        return guesses

    return draft


class Workload(RuleBasedStateMachine):
    """Requests arrive, are aborted and fail while the engine steps."""

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 16),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 20),
        max_chunk_tokens=st.integers(1, 12),
        max_num_waiting=st.integers(0, 8),
        enable_prefix_caching=st.booleans(),
        longest_guess=st.integers(0, 4),
        salt=st.integers(0, 99),
    )
    def start(self, longest_guess: int, salt: int, spare_budget: int, max_num_seqs: int, **limits: int) -> None:
        self.harness = Harness(
            CHOOSE,
            noisy_guesses(longest_guess, salt) if longest_guess else None,
            max_model_len=40,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            **limits,  # type: ignore[arg-type]  # only limits are left
        )
        self.asked: dict[str, Asked] = {}
        self.broken: set[str] = set()  # requests whose every step fails
        self.unwell: set[str] = set()  # requests that fail on their own account
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
    )
    def add(
        self, prompt: list[int], repeats: int, max_tokens: int, stop_token_ids: frozenset[int], is_scored: bool
    ) -> None:
        prompt = [0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 3, 1, 3][:repeats] + prompt
        count = 0 if is_scored else None
        others = {"stop_token_ids": stop_token_ids, "num_logprobs": count, "num_prompt_logprobs": count}
        request_id = f"r{len(self.asked)}"
        config, num_unfinished = self.harness.config, self.harness.scheduler.num_unfinished
        num_tokens = len(prompt) + max_tokens
        fits = num_tokens <= 40 and num_tokens - (max_tokens > 0) <= config.num_blocks * config.block_size
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

    @property
    def unfinished(self) -> list[str]:
        return sorted(self.asked.keys() - self.harness.finish_reasons.keys())

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.harness.abort(data.draw(st.sampled_from(self.unfinished)))
        self.harness.scheduler.check_invariants()

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def abort_during_a_step(self, data: st.DataObject) -> None:
        scheduler, executor = self.harness.scheduler, self.harness.executor
        request_id = data.draw(st.sampled_from(self.unfinished))

        def abort_and_pass(output: SchedulerOutput) -> None:
            executor.fail = self._fail
            self.harness.abort(request_id)
            scheduler.check_invariants()
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
        # Whoever is first in line advances by a token in every step, and is nobody's victim.
        bound = sum(len(asked.prompt) + asked.params.max_tokens for asked in self.asked.values())
        self.harness.drain(max_steps=bound)
        for request_id, asked in self.asked.items():
            self._check_answer(request_id, asked)

    def _check_answer(self, request_id: str, asked: Asked) -> None:
        reason, token_ids = self.harness.finish_reasons[request_id], self.harness.token_ids[request_id]
        alone = generate(CHOOSE, request_id, asked.prompt, asked.params)
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            assert token_ids == alone[: len(token_ids)]
            assert reason is FinishReason.ABORT or request_id in self.broken | self.unwell
            return
        assert request_id not in self.broken | self.unwell
        assert token_ids == alone
        is_stopped = alone and alone[-1] in asked.params.stop_token_ids
        assert reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
        if asked.params.num_logprobs is not None:
            text = list(enumerate(asked.prompt + alone))
            scored = self.harness.prompt_logprobs[request_id] + self.harness.logprobs[request_id]
            assert [(entry.rank, -entry.logprob) for entry in scored] == text[1:]


def test_every_request_gets_what_it_gets_alone() -> None:
    run_state_machine_as_test(
        Workload,
        settings=settings(
            max_examples=250,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
