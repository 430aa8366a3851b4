"""How one request was served, from the records of the engine's steps: those of a live engine, or those of its trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from statistics import median

from shoal.scheduler.step_record import ShareRecord, StepRecord

MAX_CHUNKS, MAX_PREEMPTIONS, MAX_COMPANIONS = 64, 32, 10  # that are told one by one
MAX_KNOWN_COMPANIONS = 1024  # that are told apart
ANOTHER = "another"  # stands for the id of a request that is none of the client's business


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens of the prompt that were computed in one step, and how long the step took."""

    num_tokens: int
    ms: float


@dataclass(frozen=True, slots=True)
class Preemption:
    """A preemption.

    Attributes:
        by: id of the request for which it gave way; None if it lacked blocks itself, which nobody had to give.
        ms: until the request joined the batch again; None if it has not.
    """

    by: str | None
    ms: float | None


@dataclass(frozen=True, slots=True)
class Companion:
    """A request that shared steps."""

    request_id: str
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """How one request was served so far, in milliseconds from its arrival at the server to the end of its last step.

    `total_ms` is the sum of queued, prefill, decode, preempted and other.  A step counts with all of its time, whoever
    shared it.

    Attributes:
        queued_ms: from the arrival to the first step.
        prefill_ms: of the steps that computed its prompt, or after a preemption all of its tokens again.
        decode_ms: of the steps that computed a token, and drafted ones, to choose the next.
        preempted_ms: of the time without a row.
        other_ms: between its steps: what the engine did besides, and steps in which the policy let it pause.
        num_cached_tokens: of the prompt, found in the prefix cache.
        num_output_tokens: chosen by its steps.
        prefill_chunks: the first `MAX_CHUNKS` of `num_prefill_chunks`.
        median_decode_ms, longest_decode_ms: of a decode step; None if there was none.
        mean_batch, max_batch: requests in a step, itself among them.
        num_companions: requests that shared steps, as far as they were told apart (`MAX_KNOWN_COMPANIONS`).
        companions: those that shared the most.
        preemptions: the first `MAX_PREEMPTIONS` of `num_preemptions`.
        num_drafted_tokens, num_accepted_tokens: drafted tokens that were verified, and those that were kept.
    """

    request_id: str
    total_ms: float
    queued_ms: float
    prefill_ms: float
    decode_ms: float
    preempted_ms: float
    other_ms: float
    num_cached_tokens: int
    num_output_tokens: int
    num_prefill_chunks: int
    prefill_chunks: list[PrefillChunk]
    num_decode_steps: int
    median_decode_ms: float | None
    longest_decode_ms: float | None
    mean_batch: float
    max_batch: int
    num_companions: int
    companions: list[Companion]
    num_preemptions: int
    preemptions: list[Preemption]
    num_drafted_tokens: int
    num_accepted_tokens: int


class RequestHistory:
    """Follows one request from step to step: an observer of an `EngineCore`.

    Times count from the request's arrival, which each record tells in which the request joins the batch.  So the clock
    of an engine that takes over may be another one.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._arrived_at: float | None = None  # on the clock of the engine
        self._queued = self._ended = 0.0
        self._num_cached_tokens = self._num_output_tokens = 0
        self._is_prefilling = True
        self._chunks: list[tuple[int, float]] = []
        self._decode_seconds: list[float] = []
        self._preempted: tuple[str | None, float] | None = None  # by whom and when, while it is
        self._preemptions: list[tuple[str | None, float]] = []
        self._num_drafted_tokens = self._num_accepted_tokens = 0
        self._batches: Counter[int] = Counter()
        self._companions: Counter[str] = Counter()
        self._named: set[str] = set()

    def __call__(self, record: StepRecord, named: Container[str] | None = None) -> None:
        """Take in a step.

        Args:
            named: ids that the explanation may name; None for all.
        """
        if self.request_id in record.joined:
            self._join(record)
        if self._arrived_at is None:
            return  # what becomes of a request before it joins is waiting
        for share in record.shares:
            if share.request_id == self.request_id and not share.is_padding:
                self._take(share, record)
                self._meet(record.shares, named)
        by = record.gave_way_to.get(self.request_id)
        if by is not None and self._preempted is None:
            told = by if named is None or by in named else ANOTHER
            self._preempted = None if by == self.request_id else told, record.start - self._arrived_at

    def _join(self, record: StepRecord) -> None:
        waited = record.joined[self.request_id]
        if self._arrived_at is None:
            self._queued = waited
        self._arrived_at = record.start - waited
        self._is_prefilling = True
        if self._preempted is not None:
            by, since = self._preempted
            self._preemptions.append((by, waited - since))
            self._preempted = None

    def _take(self, share: ShareRecord, record: StepRecord) -> None:
        assert self._arrived_at is not None
        self._ended = record.start - self._arrived_at + record.seconds
        if not self._chunks:
            self._num_cached_tokens = share.num_computed_tokens
        if self._is_prefilling:
            self._chunks.append((share.num_scheduled_tokens, record.seconds))
        else:
            self._decode_seconds.append(record.seconds)
        if share.samples:
            self._is_prefilling = False
            num_accepted = record.accepted.get(self.request_id, 0)
            self._num_output_tokens += 1 + num_accepted
            self._num_drafted_tokens += share.num_spec_tokens
            self._num_accepted_tokens += num_accepted

    def _meet(self, shares: Iterable[ShareRecord], named: Container[str] | None) -> None:
        ids = {share.request_id for share in shares}
        self._batches[len(ids)] += 1
        for request_id in ids - {self.request_id}:
            if request_id in self._companions or len(self._companions) < MAX_KNOWN_COMPANIONS:
                self._companions[request_id] += 1
                if named is None or request_id in named:
                    self._named.add(request_id)

    def explanation(self) -> Explanation | None:
        """What is known so far; None before the first step."""
        if not self._batches:
            return None
        prefill = sum(seconds for _, seconds in self._chunks)
        decode, preempted = sum(self._decode_seconds), sum(seconds for _, seconds in self._preemptions)
        preemptions = [Preemption(by, _ms(seconds)) for by, seconds in self._preemptions[:MAX_PREEMPTIONS]]
        if self._preempted is not None:
            preemptions = [*preemptions, Preemption(self._preempted[0], None)][:MAX_PREEMPTIONS]
        companions = [Companion(*one) for one in self._companions.items() if one[0] in self._named]
        companions.sort(key=lambda one: (-one.num_steps, one.request_id))
        return Explanation(
            request_id=self.request_id,
            total_ms=_ms(self._ended),
            queued_ms=_ms(self._queued),
            prefill_ms=_ms(prefill),
            decode_ms=_ms(decode),
            preempted_ms=_ms(preempted),
            other_ms=_ms(max(self._ended - self._queued - prefill - decode - preempted, 0.0)),
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
            num_prefill_chunks=len(self._chunks),
            prefill_chunks=[PrefillChunk(count, _ms(seconds)) for count, seconds in self._chunks[:MAX_CHUNKS]],
            num_decode_steps=len(self._decode_seconds),
            median_decode_ms=_ms(median(self._decode_seconds)) if self._decode_seconds else None,
            longest_decode_ms=_ms(max(self._decode_seconds)) if self._decode_seconds else None,
            mean_batch=round(sum(size * count for size, count in self._batches.items()) / self._batches.total(), 2),
            max_batch=max(self._batches),
            num_companions=len(self._companions),
            companions=companions[:MAX_COMPANIONS],
            num_preemptions=len(self._preemptions) + (self._preempted is not None),
            preemptions=preemptions,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
