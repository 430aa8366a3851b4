"""A request as the scheduler sees it: counts, blocks and a status."""

from __future__ import annotations

from enum import Enum

from shoal.scheduler.output import SamplingParams, SchedulingParams


class RequestStatus(str, Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Request:
    """One request.  It has no phase: `num_computed_tokens` chases `num_tokens_with_spec`.

    Attributes:
        token_ids: the prompt's tokens, then the generated ones.
        max_num_tokens: prompt and `max_tokens` together, the length at which the request ends.
        scheduling: what policies may know of the request beside its tokens.
        speculates: whether tokens may be drafted for it.
        spec_token_ids: drafted tokens that may follow `token_ids`; the next step verifies them.
        num_computed_tokens: tokens whose keys and values stand in the KV cache.
        row: of the batch; -1 while the request is not in it.
        block_ids: the block table.
        block_hashes: content hashes of the leading full blocks, as far as they were needed.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        num_scored_tokens: prompt tokens whose log-probabilities were delivered; survives a preemption.
        scheduled_time: when the request first joined a step; None before.
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_ids",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_scored_tokens",
        "params",
        "request_id",
        "row",
        "scheduled_time",
        "scheduling",
        "spec_token_ids",
        "speculates",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_time: float,
        output_token_ids: list[int] | None = None,
        *,
        scheduling: SchedulingParams | None = None,
        speculates: bool = True,
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids = prompt_token_ids + (output_token_ids or [])
        self.max_num_tokens = self.num_prompt_tokens + params.max_tokens
        self.params = params
        self.arrival_time = arrival_time
        self.scheduling = scheduling or SchedulingParams()
        self.status = RequestStatus.WAITING
        self.speculates = speculates
        self.spec_token_ids: list[int] = []
        self.num_computed_tokens = 0
        self.row = -1
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_cached_tokens = 0
        self.num_scored_tokens = 1  # nothing predicts the first token
        self.num_preemptions = 0
        self.scheduled_time: float | None = None

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
