"""A request as the scheduler sees it: counts, blocks and a status."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import KW_ONLY, InitVar, dataclass, field
from enum import Enum

from shoal.scheduler.output import SamplingParams, SchedulingParams


class RequestStatus(str, Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """One request.  It has no phase: `num_computed_tokens` chases `num_tokens_with_spec`.

    Attributes:
        token_ids: the prompt's tokens, then the generated ones; packed, since thousands of requests may wait.
        max_num_tokens: prompt and `max_tokens` together, the length at which the request ends.
        scheduling: what policies may know of the request beside its tokens.
        speculates: whether tokens may be drafted for it.
        spec_token_ids: drafted tokens that may follow `token_ids`; the next step verifies them.
        num_computed_tokens: tokens whose keys and values stand in the KV cache.
        row: of the batch; -1 while the request is not in it.
        block_ids: the block tables; `KVCache` says how.
        num_promised: blocks that nobody else gets, so that its known tokens can be computed.
        block_hashes: content hashes of the leading full blocks, as far as they were needed.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        num_scored_tokens: prompt tokens whose log-probabilities were delivered; survives a preemption.
        scheduled_time: when the request first joined a step; None before.
    """

    request_id: str
    prompt_token_ids: InitVar[Iterable[int]]
    params: SamplingParams
    arrival_time: float
    output_token_ids: InitVar[Iterable[int]] = ()
    _: KW_ONLY
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)
    speculates: bool = True

    token_ids: array[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    status: RequestStatus = RequestStatus.WAITING
    spec_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    row: int = -1
    block_ids: list[int] = field(default_factory=list)
    num_promised: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_scored_tokens: int = 1  # nothing predicts the first token
    num_preemptions: int = 0
    scheduled_time: float | None = None

    def __post_init__(self, prompt_token_ids: Iterable[int], output_token_ids: Iterable[int]) -> None:
        self.token_ids = array("i", prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids.extend(output_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + self.params.max_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_with_spec(self) -> int:
        return len(self.token_ids) + len(self.spec_token_ids)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, {self.status.value}, {self.num_computed_tokens} of {self.num_tokens} "
            f"computed, prompt {self.num_prompt_tokens}, {len(self.block_ids)} blocks)"
        )
