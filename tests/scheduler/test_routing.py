"""Which engine gets a request: what holds of every choice, and what a plain reading of the rule chooses."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from shoal.scheduler.plain_routing import ROUTINGS
from shoal.scheduler.prefix_cache import extend_hashes
from shoal.scheduler.routing import PrefixRouting

NUM_ENGINES, NUM_BLOCKS, BLOCK_SIZE = 4, 6, 2


def hashes(text: Sequence[int], salt: str = "") -> list[bytes]:
    found: list[bytes] = []
    extend_hashes(found, len(text) // BLOCK_SIZE, text, salt, BLOCK_SIZE)
    return found


class Plain:
    """The rule as it is told: each engine has a list of blocks, and all engines are looked at."""

    def __init__(self) -> None:
        self.loads: dict[int, int] = {}
        self.blocks: dict[int, list[bytes]] = {}  # the least recently used first
        self.next = 0

    def length(self, engine: int, wanted: Sequence[bytes]) -> int:
        return next((n for n, one in enumerate(wanted) if one not in self.blocks[engine]), len(wanted))

    def route(self, wanted: Sequence[bytes], without: frozenset[int]) -> int:
        left = [engine for engine in self.loads if engine not in without]
        mean = (sum(self.loads.values()) + 1) / len(self.loads)
        most = min(self.loads[engine] for engine in left) + ceil(mean)
        able = [engine for engine in left if self.loads[engine] <= most]
        turns = {engine: (engine - self.next) % 100 for engine in able}
        chosen = min(able, key=lambda one: (-self.length(one, wanted), self.loads[one], turns[one]))
        self.next = chosen + 1
        self.loads[chosen] += 1
        kept = [one for one in self.blocks[chosen] if one not in wanted]
        self.blocks[chosen] = [*kept, *reversed(wanted)][-NUM_BLOCKS:]
        return chosen


engines = st.integers(0, NUM_ENGINES - 1)
texts = st.lists(st.integers(0, 1), max_size=10)
deeds = st.one_of(
    st.tuples(st.just("route"), texts, st.frozensets(engines)),
    st.tuples(st.just("load"), engines, st.integers(0, 9)),
    st.tuples(st.just("join"), engines),
    st.tuples(st.just("leave"), engines),
    st.tuples(st.just("forget")),
)


@given(st.lists(deeds, max_size=60))
def test_every_choice_is_that_of_the_plain_rule(course: list[tuple[object, ...]]) -> None:
    plain, routing = Plain(), PrefixRouting()
    for deed in course:
        match deed:
            case ("join", int(engine)) if engine not in plain.loads:
                plain.loads[engine], plain.blocks[engine] = 0, []
                routing.join(engine, NUM_BLOCKS)
            case ("leave", int(engine)) if engine in plain.loads:
                del plain.loads[engine], plain.blocks[engine]
                routing.leave(engine)
            case ("load", int(engine), int(load)) if engine in plain.loads:
                plain.loads[engine] = load
                routing.set_load(engine, load)
            case ("forget",):
                plain.blocks = {engine: [] for engine in plain.blocks}
                routing.forget_prefixes()
            case ("route", list(text), frozenset(without)) if plain.loads.keys() - without:
                assert routing.route(hashes(text), without) == plain.route(hashes(text), without)


@given(st.lists(texts, min_size=1, max_size=80), st.integers(1, NUM_ENGINES))
def test_no_engine_has_much_more_than_another(prompts: list[list[int]], count: int) -> None:
    routing = PrefixRouting()
    for engine in range(count):
        routing.join(engine, NUM_BLOCKS)
    loads = [0] * count
    for total, prompt in enumerate(prompts, 1):
        loads[routing.route(hashes(prompt))] += 1
        assert max(loads) - min(loads) <= ceil(total / count) + 1


def started(num_engines: int = 2) -> PrefixRouting:
    routing = PrefixRouting()
    for engine in range(num_engines):
        routing.join(engine, 100)
    return routing


def test_a_conversation_stays_where_it_is() -> None:
    routing = started(8)
    text = [7] * 20
    first = routing.route(hashes(text))
    for _ in range(20):
        routing.set_load(first, 0)  # its answers come, and others'
        routing.route(hashes([len(text)] * 8))
        text += [len(text)] * 6
        assert routing.route(hashes(text)) == first


def test_requests_of_another_salt_share_no_prefix() -> None:
    routing = started()
    own = routing.route(hashes([1] * 20, "a"))
    routing.set_load(own, 0)
    assert routing.route(hashes([1] * 20, "b")) != own


def test_a_prefix_that_all_want_comes_to_all_engines_in_the_end() -> None:
    routing = started(4)
    chosen = [routing.route(hashes([1] * 20)) for _ in range(40)]
    assert [chosen.count(engine) for engine in range(4)] == [10] * 4


def test_an_engine_that_comes_back_has_forgotten() -> None:
    routing = started()
    own = routing.route(hashes([1] * 20))
    routing.leave(own)
    assert routing.route(hashes([1] * 20)) == 1 - own
    routing.join(own, 100)
    routing.set_load(1 - own, 0)
    assert routing.route(hashes([1] * 20)) == 1 - own


# -- simpler ways ------------------------------------------------------------------------------------------------------


def made(name: str, num_engines: int) -> PrefixRouting:
    routing = ROUTINGS[name]()
    for engine in range(num_engines):
        routing.join(engine, 100)
    return routing


def test_the_least_loaded_is_the_least_loaded_whatever_the_prefix() -> None:
    routing = made("load", 3)
    for engine, load in enumerate((2, 1, 5)):
        routing.set_load(engine, load)
    text = hashes([1] * 20)
    assert [routing.route(text) for _ in range(4)] == [1, 0, 1, 0]
    assert routing.route(text, without=[0, 1]) == 2


def test_the_same_first_blocks_hash_to_the_same_engine() -> None:
    routing = made("hash", 8)
    prompts = [hashes([n, n] * 8) for n in range(400)]
    chosen = [routing.route(prompt) for prompt in prompts]
    assert [routing.route(prompt) for prompt in prompts] == chosen
    assert [routing.route(hashes([*([n, n] * 8), 5, 5])) for n in range(400)] == chosen, "what follows does not matter"
    assert all(20 < chosen.count(engine) < 100 for engine in range(8))


def test_only_the_prompts_of_an_engine_that_leaves_go_elsewhere() -> None:
    routing = made("hash", 8)
    prompts = [hashes([n, n] * 8) for n in range(200)]
    before = [routing.route(prompt) for prompt in prompts]
    without = [routing.route(prompt, without=[3]) for prompt in prompts]
    routing.leave(3)
    after = [routing.route(prompt) for prompt in prompts]
    assert after == without
    assert [engine for engine in before if engine != 3] == [
        now for now, then in zip(after, before, strict=True) if then != 3
    ]


def test_a_prompt_without_a_full_block_goes_to_the_least_loaded() -> None:
    routing = made("hash", 3)
    routing.set_load(0, 1)
    assert [routing.route([]) for _ in range(2)] == [1, 2]


def test_the_less_loaded_of_two_is_never_the_most_loaded() -> None:
    routing = made("pow2", 5)
    routing.set_load(4, 1000)
    chosen = [routing.route([]) for _ in range(400)]
    assert 4 not in chosen
    assert all(70 < chosen.count(engine) < 130 for engine in range(4))
    assert {routing.route([], without=[0, 1, 2, 3]) for _ in range(3)} == {4}
