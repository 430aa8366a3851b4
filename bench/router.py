"""Which engine gets a request: what of the prompts is found in caches, how even the loads are, what a choice costs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from random import Random
from statistics import mean, median, quantiles

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.kv_cache import KVCache
from shoal.scheduler.output import SamplingParams
from shoal.scheduler.plain_routing import ROUTINGS, LeastLoaded
from shoal.scheduler.prefix_cache import extend_hashes
from shoal.scheduler.request import Request
from shoal.scheduler.routing import PrefixRouting
from shoal.terminal import show

NUM_REQUESTS, NUM_ENGINES = 1_000, (2, 4, 8)  # for each engine
BLOCK_SIZE, NUM_BLOCKS, NUM_ROWS, ENDLESS = 16, 16_384, 32, 10_000_000
PREFILL_SECONDS, DECODE_SECONDS = 0.0001, 0.01  # of a row, for a token
CONVERSATIONS_PER_SECOND = 4.0  # for each engine, which then has some two thirds of its rows taken
NUM_PROMPTS, PROMPT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 40, (100, 800), (16, 200), (16, 200)
NUM_TURNS, TURN_SECONDS = (1, 8), (2.0, 15.0)
COST_ENGINES, COST_BLOCKS, COST_PROMPT_BLOCKS, COST_CHOICES = 100, 1_000_000, 64, 5_000


def run(checkpoint: Path, *, repeats: int, **_: object) -> dict[str, object]:
    """Route conversations by each way and over several numbers of engines; print tables."""
    rows: list[dict[str, object]] = []
    for num_engines in NUM_ENGINES:
        endless = [_play(LeastLoaded, 1, num_engines, seed, ENDLESS)[0] for seed in range(repeats)]
        for name, make in ROUTINGS.items():
            played = [_play(make, num_engines, num_engines, seed, NUM_BLOCKS) for seed in range(repeats)]
            hits, loads, works = zip(*played, strict=True)
            rows.append(
                {
                    "engines": num_engines,
                    "routing": name,
                    "hits": mean(hits),
                    "to an endless cache's": mean(map(lambda own, most: own / most, hits, endless)),
                    "load, most to mean": max(loads),
                    "computed, most to mean": max(works),
                }
            )
    title = (
        f"{NUM_REQUESTS} requests for each engine, of conversations that share {NUM_PROMPTS} prompts, {repeats} seeds"
    )
    show(f"routers: {title}", rows)
    costs = _costs()
    show(f"a choice among {COST_ENGINES} engines that have {COST_BLOCKS:,} blocks, us of processor time", [costs])
    return {"router": rows, "router_costs": costs}


# -- hits and loads ----------------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """What has been said, and how many questions are to come."""

    token_ids: list[int]
    num_left: int


class Engine:
    """Rows that requests take in turn, and the scheduler's own cache."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = KVCache(SchedulerConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=10_000))
        self.waiting: deque[tuple[Request, Conversation]] = deque()
        self.num_running = self.num_asked = self.num_cached = self.num_computed = 0

    @property
    def load(self) -> int:
        return self.num_running + len(self.waiting)

    def start(self, num_rows: int) -> Iterator[tuple[float, Request, Conversation]]:
        """Have requests join while there are rows and blocks; yields each with the seconds that it takes."""
        while self.waiting and self.num_running < num_rows:
            request, conversation = self.waiting[0]
            if self.cache.reserve(request) is None:
                return
            self.waiting.popleft()
            self.num_running += 1
            num_new = request.num_tokens - request.num_computed_tokens
            self.num_asked += request.num_tokens
            self.num_cached += request.num_computed_tokens
            self._compute(request)
            yield num_new * PREFILL_SECONDS + request.params.max_tokens * DECODE_SECONDS, request, conversation

    def end(self, request: Request, answer: Sequence[int]) -> None:
        """The request has its answer."""
        self.num_running -= 1
        request.token_ids.extend(answer)
        if self.cache.reserve(request) is not None:  # else there is no room to keep it
            self._compute(request)
        self.cache.release(request)

    def _compute(self, request: Request) -> None:
        before, request.num_computed_tokens = request.num_computed_tokens, request.num_tokens
        self.num_computed += request.num_tokens - before
        self.cache.advance(request, before)


def _play(
    make: Callable[[], PrefixRouting], num_engines: int, num_sources: int, seed: int, num_blocks: int
) -> tuple[float, float, float]:
    """Have conversations go over engines, in virtual time.

    Args:
        num_sources: engines for which there are conversations; one engine may have the rows of all.

    Returns:
        The share of prompt tokens that were found in caches; by how much the engine with the most unfinished requests,
        over time, and the one that computed the most tokens, exceed the mean.
    """
    random, routing = Random(seed), make()
    prompts = [_tokens(random, PROMPT_TOKENS) for _ in range(NUM_PROMPTS)]
    popularity = [1 / rank for rank in range(1, NUM_PROMPTS + 1)]
    engines = [Engine(num_blocks) for _ in range(num_engines)]
    num_rows = NUM_ROWS * num_sources // num_engines
    for number in range(num_engines):
        routing.join(number, num_blocks)
    numbers = count()
    events: list[tuple[float, int, int | None, Request | None, Conversation]] = []
    at = 0.0
    for _ in range(2 * NUM_REQUESTS * num_sources // sum(NUM_TURNS)):
        at += random.expovariate(CONVERSATIONS_PER_SECOND * num_sources)
        prompt = random.choices(prompts, popularity)[0] + _tokens(random, QUESTION_TOKENS)
        heappush(events, (at, next(numbers), None, None, Conversation(prompt, random.randint(*NUM_TURNS))))
    load_seconds, before = [0.0] * num_engines, 0.0
    while events:
        now, number, at_engine, request, conversation = heappop(events)
        for index, engine in enumerate(engines):
            load_seconds[index] += engine.load * (now - before)
        before = now
        if at_engine is None or request is None:  # a question comes
            own = Random(f"{seed} {number}")
            params = SamplingParams(max_tokens=own.randint(*ANSWER_TOKENS), seed=0)
            request = Request(str(number), conversation.token_ids, params, now)
            hashes: list[bytes] = []
            extend_hashes(hashes, request.num_tokens // BLOCK_SIZE, request.token_ids, "", BLOCK_SIZE)
            at_engine = routing.route(hashes)
            engines[at_engine].waiting.append((request, conversation))
        else:
            answer = random.choices(range(50_000), k=request.params.max_tokens)
            engines[at_engine].end(request, answer)
            conversation.num_left -= 1
            if conversation.num_left:
                conversation.token_ids += answer + _tokens(random, QUESTION_TOKENS)
                heappush(events, (now + random.uniform(*TURN_SECONDS), next(numbers), None, None, conversation))
        for seconds, started, own_conversation in engines[at_engine].start(num_rows):
            heappush(events, (now + seconds, next(numbers), at_engine, started, own_conversation))
        routing.set_load(at_engine, engines[at_engine].load)
    hits = sum(engine.num_cached for engine in engines) / sum(engine.num_asked for engine in engines)
    works = [engine.num_computed for engine in engines]
    return hits, max(load_seconds) / mean(load_seconds), max(works) / mean(works)


def _tokens(random: Random, bounds: tuple[int, int]) -> list[int]:
    return random.choices(range(50_000), k=random.randint(*bounds))


# -- costs -------------------------------------------------------------------------------------------------------------


def _costs() -> dict[str, float]:
    """Microseconds of a choice by prefix, and of the hashes of a prompt, when all caches are full."""
    random, routing = Random(0), PrefixRouting()
    for engine in range(COST_ENGINES):
        routing.join(engine, COST_BLOCKS // COST_ENGINES)
    stems = [[random.randbytes(16) for _ in range(COST_PROMPT_BLOCKS // 2)] for _ in range(1_000)]
    choosing: list[float] = []
    num_prompts = 2 * COST_BLOCKS // COST_PROMPT_BLOCKS
    for _ in range(num_prompts + COST_CHOICES):
        hashes = random.choice(stems) + [random.randbytes(16) for _ in range(COST_PROMPT_BLOCKS // 2)]
        began = time.process_time()
        routing.route(hashes)
        choosing.append(time.process_time() - began)
        routing.set_load(random.randrange(COST_ENGINES), random.randrange(64))
    tokens = random.choices(range(50_000), k=COST_PROMPT_BLOCKS * BLOCK_SIZE)
    hashing: list[float] = []
    for _ in range(COST_CHOICES):
        began = time.process_time()
        extend_hashes([], COST_PROMPT_BLOCKS, tokens, "", BLOCK_SIZE)
        hashing.append(time.process_time() - began)
    last = choosing[-COST_CHOICES:]
    return {
        "median": 1e6 * median(last),
        "p99": 1e6 * quantiles(last, n=100)[98],
        f"hashes of {COST_PROMPT_BLOCKS} blocks": 1e6 * median(hashing),
    }
