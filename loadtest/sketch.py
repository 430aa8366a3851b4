"""An engine of the twin in a few strokes, for large clusters: what happens to a token is reckoned, not played.

The policy is `fcfs`.  Between two events (a request comes, a prompt is computed, a request ends) the batch stays as it
is, and how long any number of its steps takes is a formula.  So an engine costs a few operations for each event,
however many rows and tokens it has.  Left out are the deviations of single steps: their mean is kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, sqrt
from statistics import fmean

from shoal.loadtest.costs import CostModel, StepShape
from shoal.loadtest.replica import Delivery
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.admission import check_queue, check_request
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.pacing import Pacing


class _Row:
    """A request in an engine.

    Attributes:
        hashes: of its prompt's full blocks.
        num_tokens: known when it began to wait, or when it began to decode.
        num_left: output tokens that are to come from then on.
        num_computed: of `num_tokens`.
        joined: number of the step after which it decodes.
        is_new: whether it has no token yet.
    """

    __slots__ = (
        "arrival_time",
        "hashes",
        "is_new",
        "joined",
        "num_cached",
        "num_computed",
        "num_left",
        "num_tokens",
        "request_id",
    )

    def __init__(
        self, asked: WorkloadRequest, hashes: Sequence[bytes], arrival_time: float, num_delivered: int
    ) -> None:
        self.request_id, self.hashes, self.arrival_time = asked.request_id, hashes, arrival_time
        self.num_tokens = len(asked.prompt_token_ids) + num_delivered
        self.num_left = asked.num_output_tokens - num_delivered
        self.num_computed = self.num_cached = self.joined = 0
        self.is_new = not num_delivered


class Sketch:
    """A `TwinEngine` for the policy `fcfs`.

    Args:
        prices: by the number of decoding rows, the seconds of a plain step, and those for each key that they see; what
            is not there is added, so that engines may share it.
    """

    def __init__(self, config: SchedulerConfig, costs: CostModel, prices: dict[int, tuple[float, float]]) -> None:
        self.requests: dict[str, WorkloadRequest] = {}
        self.inbox: list[_Row] = []
        self.version = 0
        self.is_busy = False
        self.config, self._costs, self._prices = config, costs, prices
        self._pacing = Pacing(config.target_step_ms / 1000, config.max_num_batched_tokens)
        self._waiting: deque[_Row] = deque()
        self._prompts: dict[str, _Row] = {}  # rows whose prompts are computed, in the order of admission
        self._decoding: dict[str, _Row] = {}
        self._ends: list[tuple[int, str]] = []  # a heap: the step in which each of these has its last token
        self._num_steps = 0
        self._num_keys = 0  # tokens of the decoding rows
        self._num_reserved = 0  # tokens of the prompts that are computed
        self._owners: dict[bytes, int] = {}  # how many rows own a full block of a prompt
        self._num_shared = 0  # by which the owners are more than the blocks
        self._cache: OrderedDict[bytes | str, int] = OrderedDict()  # blocks by what they hold, the least recent first
        self._num_cached = 0  # blocks
        self._began = self._until = 0.0
        self._num_plain = 0  # steps that are under way, if they are plain
        self._chunks: list[tuple[_Row, int]] = []  # of prompts, in the step that is under way
        self._news: list[Delivery] = []

    # -- requests come ---------------------------------------------------------------------------------------------

    def put(self, asked: WorkloadRequest, hashes: list[bytes], now: float, num_delivered: int) -> None:
        self.requests[asked.request_id] = asked
        self.inbox.append(_Row(asked, hashes, now, num_delivered))

    def take(self) -> list[tuple[str, ShoalError]]:
        refused: list[tuple[str, ShoalError]] = []
        for row in self.inbox:
            asked = self.requests[row.request_id]
            try:
                check_request(self.config, len(asked.prompt_token_ids), asked.max_tokens)
                check_queue(self.config, len(self._waiting) + len(self._prompts) + len(self._decoding))
                self._waiting.append(row)
            except ShoalError as error:
                refused.append((row.request_id, error))
                del self.requests[row.request_id]
        self.inbox.clear()
        return refused

    def wake_time(self, now: float) -> float | None:
        return now if self._waiting or self._prompts or self._decoding else None

    # -- steps -----------------------------------------------------------------------------------------------------

    def begin(self, now: float, num_busy: int) -> float:
        self.is_busy, self._began = True, now
        gave_way = self._make_room()
        self._chunks, num_decoding = [], len(self._decoding)
        budget = most = self.config.max_num_batched_tokens
        if num_decoding:
            budget = min(most, num_decoding + self._pacing.num_prompt_tokens)
        budget -= num_decoding
        for row in self._prompts.values():
            budget -= self._give(row, budget)
        while budget > 0 and self._waiting and not gave_way and self._admit(self._waiting[0]):
            budget -= self._give(self._waiting.popleft(), budget)
        if self._chunks:
            self._until = now + self._mixed_seconds()
        else:
            self._until = now + self._plain() if num_decoding else now
        return self._until

    def interrupt(self, now: float) -> float | None:
        if not self._num_plain or (count := self._steps_until(now)) == self._num_plain:
            return None
        self._num_plain = count
        self._until = self._began + self._plain_seconds(count)
        return self._until

    def end(self) -> list[Delivery]:
        self.is_busy = False
        news, self._news = self._news, []
        seen_at, num_decoding = self._until + self._costs.delivery_seconds, len(self._decoding)
        count, self._num_plain = self._num_plain, 0
        if self._chunks:
            count, seconds = 1, self._until - self._began
            self._pacing.learn(num_decoding, sum(tokens for _, tokens in self._chunks), seconds)
        self._num_steps += count
        self._num_keys += count * num_decoding
        while self._ends and self._ends[0][0] <= self._num_steps:
            step, request_id = heappop(self._ends)
            row = self._decoding.get(request_id)
            if row is not None and row.joined + row.num_left == step:
                self._leave(row)
                self._keep(request_id, row.num_left // self.config.block_size)
                news.append(self._last(row, seen_at, row.num_left))
        for row, tokens in self._chunks:
            row.num_computed += tokens
            if row.num_computed == row.num_tokens:
                news.append(self._decode(row, seen_at))
        return news

    def break_off(self, now: float) -> list[Delivery]:
        done = self._steps_until(now) - (now < self._until) if self._num_plain else 0
        seen_at = now + self._costs.delivery_seconds
        found = [Delivery(name, seen_at, self._num_steps + done - row.joined) for name, row in self._decoding.items()]
        return self._news + [one for one in found if one.num_tokens]

    # -- what is seen of it ----------------------------------------------------------------------------------------

    def queue_seconds(self, now: float) -> float:
        return now - self._waiting[0].arrival_time if self._waiting else 0.0

    @property
    def kv_cache_usage(self) -> float:
        return min(self._num_owned / self.config.num_blocks, 1.0)

    # -- prompts ---------------------------------------------------------------------------------------------------

    @property
    def _num_owned(self) -> float:
        """Blocks that requests own, shared ones once; the last of each request is half full on average."""
        num_rows = len(self._prompts) + len(self._decoding)
        return (self._num_keys + self._num_reserved) / self.config.block_size + num_rows / 2 - self._num_shared

    def _admit(self, row: _Row) -> bool:
        """Have a request join the batch, if there are a row and blocks."""
        config = self.config
        if len(self._prompts) + len(self._decoding) == config.max_num_seqs:
            return False
        shared = sum(one in self._owners for one in row.hashes)
        if self._num_owned + row.num_tokens / config.block_size - shared > config.num_blocks:
            return False
        found = next((place for place, one in enumerate(row.hashes) if one not in self._cache), len(row.hashes))
        self._own(row)
        if row.request_id in self._cache:  # it had to wait again
            found = row.num_tokens // config.block_size
        row.num_computed = row.num_cached = min(found * config.block_size, row.num_tokens - 1)
        self._prompts[row.request_id] = row
        self._num_reserved += row.num_tokens
        for one in reversed(row.hashes):
            self._keep(one, 1)
        return True

    def _give(self, row: _Row, budget: int) -> int:
        """A row's share of the budget."""
        tokens = min(row.num_tokens - row.num_computed, self.config.max_chunk_tokens, budget)
        if tokens:
            self._chunks.append((row, tokens))
        return tokens

    def _mixed_seconds(self) -> float:
        num_decoding = len(self._decoding)
        num_tokens, num_pairs, num_keys, num_samples = num_decoding, self._num_keys, self._num_keys, num_decoding
        for row, tokens in self._chunks:
            num_tokens += tokens
            num_pairs += tokens * row.num_computed + tokens * (tokens + 1) // 2
            num_keys += row.num_computed + tokens
            num_samples += row.num_computed + tokens == row.num_tokens
        shape = StepShape(num_tokens, num_pairs, num_keys, num_samples, num_samples)
        return self._costs.seconds(shape) * fmean(self._costs.ratios(num_tokens))

    def _decode(self, row: _Row, seen_at: float) -> Delivery:
        """A prompt is computed, and the first token is chosen."""
        del self._prompts[row.request_id]
        self._num_reserved -= row.num_tokens
        cached = row.num_cached if row.is_new else 0
        if row.num_left == 1:
            self._disown(row)
            return self._last(row, seen_at, 1, cached)
        row.num_tokens += 1
        row.num_left -= 1
        row.joined, row.is_new = self._num_steps, False
        self._decoding[row.request_id] = row
        self._num_keys += row.num_tokens
        heappush(self._ends, (row.joined + row.num_left, row.request_id))
        return Delivery(row.request_id, seen_at, 1, cached)

    def _last(self, row: _Row, seen_at: float, num_tokens: int, num_cached: int = 0) -> Delivery:
        return Delivery(row.request_id, seen_at, num_tokens, num_cached, is_last=True)

    # -- plain steps -----------------------------------------------------------------------------------------------

    def _plain(self) -> float:
        """Plan plain steps until a request ends or blocks are used up; returns the seconds of all."""
        num_rows = len(self._decoding)
        if num_rows not in self._prices:
            ratio = fmean(self._costs.ratios(num_rows))
            of_rows = self._costs.seconds_of_rows(num_rows, num_rows, num_rows) * ratio
            self._prices[num_rows] = of_rows, (self._costs.pair_seconds + self._costs.key_seconds) * ratio
        of_rows, per_key = self._prices[num_rows]
        self._first = of_rows + per_key * self._num_keys  # seconds of the first
        self._more = per_key * num_rows  # by which each takes longer than the one before
        left = self._ends[0][0] - self._num_steps
        free = (self.config.num_blocks - self._num_owned) * self.config.block_size
        self._num_plain = max(min(left, int(free) // num_rows), 1)
        return self._plain_seconds(self._num_plain)

    def _plain_seconds(self, count: int) -> float:
        return count * self._first + count * (count - 1) / 2 * self._more

    def _steps_until(self, now: float) -> int:
        """How many of the plain steps begin before `now`; at least one."""
        seconds, half = now - self._began, self._more / 2
        first = self._first - half
        root = seconds / first if not half else (sqrt(first * first + 4 * half * seconds) - first) / (2 * half)
        return min(max(ceil(root - 1e-9), 1), self._num_plain)

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _make_room(self) -> bool:
        """Have the latest requests wait again while blocks are lacking for the next step; whether any does."""
        before = len(self._decoding)
        while len(self._decoding) > 1 and self._num_owned + len(self._decoding) > self.config.num_blocks:
            row = self._decoding[next(reversed(self._decoding))]
            done = self._num_steps - row.joined
            self._leave(row)
            row.num_tokens += done
            row.num_left -= done
            row.joined = -1
            if done:
                self._news.append(Delivery(row.request_id, self._began + self._costs.delivery_seconds, done))
            self._keep(row.request_id, row.num_tokens // self.config.block_size - len(row.hashes))
            self._waiting.appendleft(row)
        return len(self._decoding) < before

    def _own(self, row: _Row) -> None:
        """A row owns the full blocks of its prompt."""
        owners = self._owners
        for one in row.hashes:
            if one in owners:
                owners[one] += 1
                self._num_shared += 1
            else:
                owners[one] = 1

    def _disown(self, row: _Row) -> None:
        owners = self._owners
        for one in row.hashes:
            if owners[one] == 1:
                del owners[one]
            else:
                owners[one] -= 1
                self._num_shared -= 1

    def _leave(self, row: _Row) -> None:
        self._disown(row)
        del self._decoding[row.request_id]
        self._num_keys -= row.num_tokens + self._num_steps - row.joined

    def _keep(self, what: bytes | str, num_blocks: int) -> None:
        """The cache has these blocks too; it forgets what was used least recently for them."""
        if what in self._cache:
            self._cache.move_to_end(what)
            return
        self._cache[what] = num_blocks
        self._num_cached += num_blocks
        while self._num_cached > self.config.num_blocks:
            self._num_cached -= self._cache.popitem(last=False)[1]
