"""What holds between two steps, whatever happened: checked in tests, and whenever the engine is idle."""

from __future__ import annotations

from shoal.scheduler.prefix_cache import UNSEEN
from shoal.scheduler.request import Request, RequestStatus
from shoal.scheduler.scheduler import Scheduler


def check_invariants(scheduler: Scheduler) -> None:
    """Assert that every block and row is accounted for and every request is where its status says."""
    waiting, running, padding = scheduler.waiting, scheduler.running, scheduler.padding
    batch = [*running.values(), *padding.values()]
    _check_blocks(scheduler, batch)
    rows = [*scheduler.free_rows, *(request.row for request in batch)]
    assert sorted(rows) == list(range(scheduler.config.max_num_seqs)), "a row leaked, or has two requests"
    assert not running.keys() & waiting.keys()
    assert not padding.keys() & (running.keys() | waiting.keys())
    for request in waiting.values():
        assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert not request.block_ids
        assert request.row == -1
        assert request.num_computed_tokens == request.num_promised == 0
    for request in running.values():
        assert request.status is RequestStatus.RUNNING
        assert request.num_computed_tokens < request.num_tokens_with_spec
    for request in padding.values():
        assert request.status is RequestStatus.FINISHED
        assert request.num_computed_tokens > 0
    assert scheduler.num_unfinished or not padding, "padding rows outlived their batch"


def _check_blocks(scheduler: Scheduler, batch: list[Request]) -> None:
    """The accounting equation, and that requests own what their next queries see."""
    config, kv_cache = scheduler.config, scheduler.kv_cache
    kv_cache.pool.check([block_id for block_id in request.block_ids if block_id != UNSEEN] for request in batch)
    assert kv_cache.num_promised == sum(request.num_promised for request in batch), "a promise leaked"
    num_groups = len(config.cache_groups)
    for request in batch:
        assert len(request.block_ids) % num_groups == 0
        for number, group in enumerate(config.cache_groups):
            table = request.block_ids[number::num_groups]
            first = group.first_seen(request.num_computed_tokens) // config.block_size
            assert len(table) * config.block_size >= request.num_computed_tokens, "a computed token has no block"
            assert UNSEEN not in table[first:], "a block went back too early"
