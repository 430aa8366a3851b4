"""The interface of the policies: how they are found, what they are asked and told, with policies written here."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from shoal.scheduler import policies
from shoal.scheduler.config import Config, SchedulerConfig
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.output import FinishReason, SchedulerOutput
from shoal.scheduler.policies import POLICIES, describe_policies, find_policy
from shoal.scheduler.policies.fair import VirtualTokenCounter
from shoal.scheduler.policies.fcfs import FirstComeFirstServed
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.request import Request, RequestStatus
from tests.fakes import LIMITS, Harness, InjectedError, generate, hashed, make_policy, params

KINDS = {knob.name: policy.Knobs for policy in POLICIES.values() for knob in fields(policy.Knobs)}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_found_by_name(name: str) -> None:
    assert find_policy(name) is POLICIES[name]


def test_an_unknown_policy_is_refused_with_the_names_known() -> None:
    with pytest.raises(ConfigError, match=f"'lifo'.*{', '.join(POLICIES)}") as caught:
        find_policy("lifo")
    assert caught.value.param == "policy"


def test_each_policy_says_in_one_line_of_its_own_what_it_does() -> None:
    described = describe_policies()
    assert described.keys() == POLICIES.keys()
    assert len(set(described.values())) == len(POLICIES)
    for name, line in described.items():
        assert line.endswith("."), name
        assert "__doc__" in vars(POLICIES[name]) and line in str(vars(POLICIES[name])["__doc__"]), name


@pytest.mark.parametrize(
    ("knob", "value"),
    [(knob, value) for knob in KINDS for value in (0, -1.0, float("nan"), float("inf"))],
)
def test_a_knob_out_of_range_is_named(knob: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{knob} must be .*, not {value}") as caught:
        KINDS[knob](**{knob: value})
    assert caught.value.param == knob


def test_the_knobs_of_all_policies_have_names_of_their_own() -> None:
    kinds = {policy.Knobs for policy in POLICIES.values()}
    assert KINDS.keys().isdisjoint(field.name for field in fields(SchedulerConfig))
    assert sum(len(fields(kind)) for kind in kinds) == len(KINDS) == 9


def test_a_policy_takes_its_own_knobs_out_of_those_of_all() -> None:
    knobs = VirtualTokenCounter.Knobs(fair_lead=3)
    assert POLICIES["fair"].Knobs.select({"fair_lead": 3, "ageing_tokens": 4}) == knobs
    assert POLICIES["fcfs"].Knobs.select({"fair_lead": 3}) == Config()
    with pytest.raises(AssertionError, match="another policy"):
        POLICIES["sjf"](LIMITS, knobs)


LONGEST_FIRST = '''
"""The longest prompt first."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.scheduler.config import Config, setting
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.request import Request


class LongestPromptFirst(KeyedPolicy):
    """The longest prompt goes first; waiting makes up for length."""

    name = "longest"

    @dataclass(frozen=True, kw_only=True)
    class Knobs(Config):
        patience: float = setting(1.0, above=0, help="For longest: seconds that make up for a token of the prompt.")

    knobs: Knobs

    def key(self, request: Request) -> float:
        return request.arrival_time - request.num_prompt_tokens * self.knobs.patience
'''


@pytest.fixture
def _longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adds a file to the package of the policies."""
    (tmp_path / "longest.py").write_text(LONGEST_FIRST)
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    monkeypatch.setattr(policies, "POLICIES", policies.discover_policies())
    yield
    del sys.modules["shoal.scheduler.policies.longest"]


@pytest.mark.usefixtures("_longest_first")
def test_a_policy_is_added_in_one_file_of_25_lines_with_its_knob() -> None:
    assert len(LONGEST_FIRST.strip().splitlines()) <= 25
    assert policies.POLICIES.keys() == POLICIES.keys() | {"longest"}
    assert describe_policies()["longest"] == "The longest prompt goes first; waiting makes up for length."
    for patience, expected in ((2.0, ["long", "short"]), (0.5, ["short", "long"])):
        knobs = find_policy("longest").Knobs.select({"patience": patience})
        harness = Harness(max_num_seqs=1, policy="longest", knobs=knobs)
        harness.add("short", [1], max_tokens=1)
        harness.now = 2.0
        harness.add("long", [1, 2, 3], max_tokens=1)
        harness.drain()
        assert list(harness.finish_reasons) == expected


def test_fcfs_names_the_latest_arrival_and_never_preempts_for_a_newcomer() -> None:
    policy = make_policy(FirstComeFirstServed)
    first, second, third = (Request(name, [1], params(), 0.0) for name in "abc")
    assert list(policy.order([first], [second], 0.0)) == [first, second]
    assert policy.victim(first, [first, second], 0.0) is second
    assert policy.victim(second, [first, second], 0.0) is None
    assert policy.victim(third, [first, second], 0.0) is None


def is_urgent(request: Request) -> bool:
    return request.request_id.startswith("!")


class UrgentTakes(FirstComeFirstServed):
    """Requests whose id starts with "!" may take the blocks and the rows of those that are not urgent."""

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        others = [other for other in running if not is_urgent(other)]
        return others[-1] if others and is_urgent(request) else super().victim(request, running, now)


class UrgentFirst(UrgentTakes):
    """They go first, too."""

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        return sorted([*running, *waiting], key=is_urgent, reverse=True)


def test_a_policy_may_order_the_waiting() -> None:
    harness = Harness(max_num_seqs=1, policy=make_policy(UrgentFirst))
    for request_id in ("a", "b", "!c"):
        harness.add(request_id, [1], max_tokens=1)
    harness.drain()
    assert list(harness.finish_reasons) == ["!c", "a", "b"]


def test_a_policy_may_preempt_for_a_waiting_request() -> None:
    harness = Harness(
        num_blocks=4, block_size=2, max_model_len=9, policy=make_policy(UrgentTakes), enable_prefix_caching=False
    )
    victims = [harness.add(request_id, [1, 2, 3], max_tokens=2) for request_id in "ab"]
    harness.step()
    harness.add("!c", [4, 5, 6, 7], max_tokens=2)
    harness.step()
    assert [harness.status(victim) for victim in victims] == [RequestStatus.FINISHED, RequestStatus.PREEMPTED]
    assert harness.chunks[-1] == [("a", 3, 1), ("!c", 0, 4)], "the share that the victim had in this step is gone"
    assert harness.executor.released[-1] == [1]
    harness.drain()
    for request_id, prompt in (("a", [1, 2, 3]), ("b", [1, 2, 3]), ("!c", [4, 5, 6, 7])):
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, prompt, params(2))


def test_the_share_of_a_victim_goes_back_into_the_budget() -> None:
    harness = Harness(
        num_blocks=6,
        block_size=2,
        max_model_len=13,
        max_num_batched_tokens=8,
        policy=make_policy(UrgentFirst),
        enable_prefix_caching=False,
    )
    harness.add("a", list(range(12)), max_tokens=1)
    harness.step()
    harness.add("!b", list(range(20, 30)), max_tokens=1)
    harness.step()
    assert harness.chunks == [[("a", 0, 8)], [("!b", 0, 8)]]
    harness.drain()


def test_a_full_batch_gives_a_row_to_the_request_that_the_policy_prefers() -> None:
    harness = Harness(max_num_seqs=2, policy=make_policy(UrgentFirst), enable_prefix_caching=False)
    for request_id in ("a", "b"):
        harness.add(request_id, [1, 2], max_tokens=3)
    harness.step()
    for request_id in ("c", "!d", "!e"):
        harness.add(request_id, [3], max_tokens=1)
    harness.drain()
    assert harness.chunks == [
        [("a", 0, 2), ("b", 0, 2)],
        [("!d", 0, 1), ("!e", 0, 1)],
        [("a", 0, 3), ("b", 0, 3)],
        [("a", 3, 1), ("b", 3, 1)],
        [("c", 0, 1)],
    ]


def test_a_row_is_taken_although_the_budget_is_spent() -> None:
    """The victim's share of the step goes with it."""
    for policy in (make_policy(UrgentTakes), make_policy(UrgentFirst)):
        harness = Harness(max_num_seqs=2, max_num_batched_tokens=2, policy=policy, enable_prefix_caching=False)
        harness.add("a", [1], max_tokens=9)
        harness.add("b", [2], max_tokens=9)
        harness.step()
        harness.add("!c", [3, 4], max_tokens=1)
        harness.step()
        harness.step()
        assert list(map(sorted, harness.chunks)) == [
            [("a", 0, 1), ("b", 0, 1)],
            [("!c", 0, 1), ("a", 1, 1)],
            [("!c", 1, 1), ("a", 2, 1)],
        ]
        harness.drain()


def test_the_budget_is_given_out_in_the_order_of_the_policy() -> None:
    """The preferred request does not wait for the prompts of others, each of which advances by one token."""
    harness = Harness(
        max_num_batched_tokens=8, max_num_seqs=2, policy=make_policy(UrgentFirst), enable_prefix_caching=False
    )
    harness.add("a", list(range(20)), max_tokens=1)
    harness.step()
    harness.add("!b", list(range(20, 30)), max_tokens=1)
    harness.drain()
    assert harness.chunks == [
        [("a", 0, 8)],
        [("!b", 0, 7), ("a", 8, 1)],
        [("!b", 7, 3), ("a", 9, 5)],
        [("a", 14, 6)],
    ]


def test_no_request_joins_with_the_tokens_that_running_requests_are_sure_of() -> None:
    harness = Harness(
        max_num_batched_tokens=3, max_num_seqs=3, policy=make_policy(UrgentFirst), enable_prefix_caching=False
    )
    for request_id in ("!a", "!b", "c"):
        harness.add(request_id, [1, 2, 3], max_tokens=1)
    harness.drain()
    assert harness.chunks == [[("!a", 0, 3)], [("!b", 0, 3)], [("c", 0, 3)]]
    harness = Harness(
        max_num_batched_tokens=3, max_num_seqs=3, policy=make_policy(UrgentFirst), enable_prefix_caching=False
    )
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=1)
    harness.step()
    for request_id in ("!b", "!c"):
        harness.add(request_id, [1, 2], max_tokens=1)
    harness.drain()
    assert harness.chunks == [[("a", 0, 3)], [("!b", 0, 2), ("a", 3, 1)], [("!c", 0, 2), ("a", 4, 1)]]


class Rests(FirstComeFirstServed):
    """Has every running request pause in every step."""

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        return waiting


@pytest.mark.parametrize("num_blocks", [64, 4])
def test_not_all_can_pause(num_blocks: int) -> None:
    """A request that has just joined is not asked; then the first goes on alone, and takes blocks of paused ones."""
    harness = Harness(
        max_num_seqs=2, policy=make_policy(Rests), num_blocks=num_blocks, block_size=2, enable_prefix_caching=False
    )
    for request_id in "abc":
        harness.add(request_id, [1, 2, 3], max_tokens=4)
    harness.drain()
    again = [("b", 3, 1)] if num_blocks == 64 else [("b", 0, 4)]
    assert harness.chunks[:6] == [
        [("a", 0, 3), ("b", 0, 3)],
        *([("a", 3 + step, 1)] for step in range(3)),
        [("c", 0, 3)] if num_blocks == 64 else [*again, ("c", 0, 3)],
        again if num_blocks == 64 else [("b", 4, 1)],
    ]
    for request_id in "abc":
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, [1, 2, 3], params(4))


class Notes(FirstComeFirstServed):
    """Records what it is told."""

    def __init__(self, config: SchedulerConfig, knobs: Config) -> None:
        super().__init__(config, knobs)
        self.notes: list[str] = []

    def on_arrival(self, request: Request) -> None:
        self.notes.append(f"{request.request_id} arrives")

    def on_admission(self, request: Request) -> None:
        self.notes.append(f"{request.request_id} joins")

    def on_preemption(self, request: Request) -> None:
        self.notes.append(f"{request.request_id} is {request.status.value}")

    def on_progress(self, request: Request, num_tokens: int) -> None:
        self.notes.append(f"{request.request_id} +{num_tokens} = {request.num_output_tokens}")

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        self.notes.append(f"{request.request_id} ends by {reason.value}")


def notes(act: Callable[[Harness], object], **limits: int) -> list[str]:
    policy = make_policy(Notes)
    harness = Harness(policy=policy, **limits)
    act(harness)
    harness.drain()
    return policy.notes


def test_a_policy_is_told_of_each_event_of_a_request() -> None:
    def act(harness: Harness) -> None:
        harness.add("a", [1, 2, 3], max_tokens=2)
        harness.add("b", [1], max_tokens=0)

    told = notes(act, max_num_seqs=1, max_chunk_tokens=2)
    assert told == [
        *("a arrives", "b arrives", "a joins", "a +1 = 1", "a +1 = 2", "a ends by length"),
        *("b joins", "b ends by length"),
    ]


def test_a_policy_is_told_of_preemptions() -> None:
    def act(harness: Harness) -> None:
        harness.add("a", [1, 2, 3], max_tokens=3)
        harness.add("b", [4, 5, 6], max_tokens=3)

    told = [note for note in notes(act, num_blocks=4, block_size=2, max_model_len=8) if note.startswith("b")]
    assert told == [
        *("b arrives", "b joins", "b +1 = 1", "b +1 = 2", "b is preempted"),
        *("b joins", "b +1 = 3", "b ends by length"),
    ]


def test_a_policy_is_told_of_every_end_once() -> None:
    def act(harness: Harness) -> None:
        for request_id in "abcd":
            harness.add(request_id, [ord(request_id)], max_tokens=2)
        harness.abort("d")  # while it waits
        harness.step()
        harness.abort("a")  # while it runs
        harness.executor.error = lambda share: "Injected" if share.request_id == "b" else None

        def fail(output: SchedulerOutput) -> None:
            if any(share.request_id == "c" for share in output.scheduled):
                raise InjectedError

        harness.executor.fail = fail

    ends = [note for note in notes(act) if "ends" in note]
    assert ends == ["d ends by abort", "a ends by abort", "b ends by error", "c ends by error"]


def test_the_scheduler_knows_when_there_is_something_to_do() -> None:
    class Later(FirstComeFirstServed):
        def wake_time(self, waiting: Collection[Request], now: float) -> float:
            return 5.0

        def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
            return [*running, *waiting] if now >= 5.0 else running

    harness = Harness(policy=make_policy(Later))
    assert harness.scheduler.wake_time(0.0) is None, "nothing without a request"
    harness.add("a", [1], max_tokens=2)
    assert harness.scheduler.wake_time(0.0) == 5.0
    harness.now = 7.0
    assert harness.scheduler.wake_time(7.0) == 7.0, "never in the past"
    harness.step()
    assert harness.scheduler.wake_time(8.0) == 8.0, "a running request has work"
    harness.drain()
    assert harness.scheduler.wake_time(9.0) is None


class ShortestFirst(FirstComeFirstServed):
    """The least work left goes first; the request with the most of it gives way."""

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        return sorted([*running, *waiting], key=lambda request: request.max_num_tokens - request.num_tokens)


def test_a_policy_sees_what_the_requests_have_left_to_do() -> None:
    harness = Harness(max_num_seqs=1, policy=make_policy(ShortestFirst))
    for request_id, max_tokens in (("long", 5), ("short", 1), ("middle", 3)):
        harness.add(request_id, [1], max_tokens)
    harness.drain()
    assert list(harness.finish_reasons) == ["short", "middle", "long"]


def test_no_other_request_takes_the_blocks_that_a_preemption_freed_in_the_same_step() -> None:
    harness = Harness(
        num_blocks=4, block_size=2, max_model_len=8, policy=make_policy(ShortestFirst), enable_prefix_caching=False
    )
    harness.add("a", [1, 2, 3], max_tokens=4)
    harness.add("b", [4, 5, 6], max_tokens=4)
    harness.step()
    harness.step()
    harness.add("c", [7], max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("a", 4, 1)], "one block is free, and the shortest request would fit"
    harness.drain()


class SkipsUntil(FirstComeFirstServed):
    """Passes over requests until the second that stands in their id."""

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        return [*running, *(request for request in waiting if now >= float(request.request_id))]


def test_a_policy_gets_the_time_and_may_pass_over_a_request() -> None:
    harness = Harness(policy=make_policy(SkipsUntil))
    for request_id in ("3", "0", "2"):
        harness.add(request_id, [1], max_tokens=1)
    for _ in range(5):
        harness.step()
    assert {step[0].request_id: time for time, step in enumerate(harness.executor.steps) if step} == {
        "0": 0,
        "2": 2,
        "3": 3,
    }


class Counting(KeyedPolicy):
    """Counts how often each request's key is asked for."""

    def __init__(self, config: SchedulerConfig, knobs: Config) -> None:
        super().__init__(config, knobs)
        self.asked: Counter[str] = Counter()

    def key(self, request: Request) -> float:
        self.asked[request.request_id] += 1
        return request.arrival_time


def test_a_step_asks_for_no_keys_of_the_many_that_wait() -> None:
    policy = make_policy(Counting)
    harness = Harness(max_num_seqs=1, policy=policy)
    for index in range(5):
        harness.add(f"{index}", [1], max_tokens=3)
        harness.now += 1
    assert policy.asked == dict.fromkeys("01234", 1)
    harness.step()
    harness.step()
    assert policy.asked.total() < 20
    assert [policy.asked[name] for name in "234"] == [1, 1, 1]
    harness.drain()
