"""What those who watch an engine are told of it: plain data, JSON from the engine process to the browser.

Long lists of events are kept on both sides, so that what is repeated in each of them has no names (`array_like`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_WAITING = 64  # requests of the queue that an event tells of, one by one
MAX_CELLS = 4096  # of the map of the block pool
# Characters of the map.  A block that one request owns has the character of the request's row: FIRST_ROW and on.
CACHED, FREE, SHARED, FIRST_ROW = 45, 46, 43, 48

RowState = Literal["prefill", "decode", "pause", "padding"]
WaitReason = Literal["policy", "rows", "blocks", "budget", "behind"]


class Watch(msgspec.Struct, tag=True):
    """Command: tell of the engine's steps, or be silent.

    Attributes:
        num_steps: the next steps that are told of one by one, whatever that costs; after them as many as an eye takes.
    """

    is_on: bool
    num_steps: int = 0


class UsePolicy(msgspec.Struct, tag=True):
    """Command: schedule by this policy, as soon as no request is unfinished."""

    policy: str


class Seen(msgspec.Struct, tag=True):
    """Report: a `StepEvent` as JSON."""

    event: bytes


class UsesPolicy(msgspec.Struct, tag=True):
    """Report: requests are scheduled by this policy from now on."""

    policy: str


class Row(msgspec.Struct, array_like=True):
    """A row of the batch in a step.

    Attributes:
        row: its number.
        num_prompt_tokens, num_tokens, max_num_tokens: of the request: those of its prompt, those that are known after
            the step, and how many it can become.
        num_computed_tokens: before the step.
        num_scheduled_tokens: computed in the step, drafted ones included; 0 if the request pauses.
        num_spec_tokens, num_accepted_tokens: drafted tokens that were verified, and those that were kept.
        num_cached_tokens: of the prompt, found in the prefix cache.
        age: seconds since the request arrived.
    """

    row: int
    request_id: str
    state: RowState
    num_prompt_tokens: int
    num_tokens: int
    max_num_tokens: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    num_spec_tokens: int
    num_accepted_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    age: float


class Waiting(msgspec.Struct, array_like=True):
    """A request that waits.

    Attributes:
        reason: why it does not run: the policy holds it back, all rows are taken, blocks are lacking, the step has no
            tokens left (budget), or a request before it waits for one of these (behind).
        num_blocks: that it needs.
        gave_way_to: id of the request for which it was preempted last; its own if it lacked blocks itself.
        age: seconds since it arrived.
    """

    request_id: str
    reason: WaitReason
    num_tokens: int
    num_blocks: int
    num_preemptions: int
    gave_way_to: str
    age: float


class Parts(msgspec.Struct):
    """Seconds of the parts of one step: arrays are made in `build`, tokens chosen in `sample`, in `propose` results are
    divided and drafts proposed, and news is sent in `send`.
    """

    schedule: float
    build: float
    forward: float
    sample: float
    propose: float
    update: float
    send: float


class StepEvent(msgspec.Struct, kw_only=True):
    """What an engine did since the event before, and how it stands now.

    Attributes:
        num_steps: since the event before, all told of together; `number` is that of the last, counted from 0.
        num_tokens, num_output_tokens: computed, and chosen, in these steps.
        batch: rows of the last step, and of requests that paused in it.
        waiting: the first `MAX_WAITING` of the queue, in the order of the policy.
        seconds: since the event before.
        parts: of the last step, if it was measured.
        joined, left: ids of the requests that joined the batch, and that left it for good, since the event before.
        preempted: by the id of each request that was preempted since, for which one.
        num_blocks, num_owned_blocks: of the KV cache.
        blocks: a character for each block: "." is free, "-" is cached, "+" is shared, and the row follows "0" in
            Unicode.  Of more than `MAX_CELLS` blocks a character stands for `blocks_per_cell` of them.
        tables: block tables by request id; about twice a second.
        num_prefix_queries, num_prefix_hits: tokens looked up in the prefix cache, and found there, since.
        num_draft_tokens, num_accepted_tokens_per_pos: of proposals that were verified since.
        experts: rows that each expert computed in each layer since they were told of last.
    """

    number: int
    num_steps: int
    num_tokens: int
    policy: str
    batch: list[Row]
    waiting: list[Waiting]
    num_waiting: int
    num_blocks: int
    num_owned_blocks: int
    blocks_per_cell: int
    blocks: str
    tables: dict[str, list[int]] | None
    num_prefix_queries: int
    num_prefix_hits: int
    num_draft_tokens: int
    num_accepted_tokens_per_pos: list[int]
    seconds: float = 0.0
    num_output_tokens: int = 0
    joined: list[str] = []
    left: list[str] = []
    preempted: dict[str, str] = {}
    parts: Parts | None = None
    experts: list[list[int]] | None = None
