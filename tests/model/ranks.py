"""Ranks that are threads of one process, each with a backend of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from queue import SimpleQueue
from typing import Any

from torch.distributed import HashStore

from shoal.model.backends.split import Shard, Split
from shoal.model.backends.torch_parallel import ParallelBackend
from shoal.model.backends.torch_ranks import connect
from shoal.model.record import ModelRecord
from shoal.model.step.batch import ForwardBatch

NUM_BLOCKS, BLOCK_SIZE = 256, 4


@contextmanager
def on_ranks(record: ModelRecord, split: Split, dtype: Any = "float32") -> Iterator[dict[int, ParallelBackend]]:
    """The backends of a model's ranks by number, of which the first one tells the others what to do."""
    store = HashStore()
    steps: list[SimpleQueue[tuple[ForwardBatch, int | None] | None]] = [
        SimpleQueue() for _ in range(1, split.num_ranks)
    ]

    def tell(batch: ForwardBatch, num_layers: int | None) -> None:
        for queue in steps:
            queue.put((copy(batch), num_layers))

    def make(rank: int, told: Callable[[ForwardBatch, int | None], None]) -> ParallelBackend:
        shard = Shard(split, rank)
        links = connect(store, shard, "cpu", "127.0.0.1")
        return ParallelBackend(record, shard, links, told, dtype=dtype, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)

    def follow(rank: int) -> None:
        backend = backends[rank] = make(rank, lambda batch, num_layers: None)
        while step := steps[rank - 1].get():
            backend.follow(*step)

    backends: dict[int, ParallelBackend] = {}
    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, split.num_ranks)]
    for thread in threads:
        thread.start()
    backends[0] = make(0, tell)
    yield backends
    for queue in steps:
        queue.put(None)
    for thread in threads:
        thread.join(10)
