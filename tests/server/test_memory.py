"""How many blocks the KV cache gets, and how they are divided among layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.model.architecture import bytes_per_block
from shoal.scheduler.config import CacheGroup
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.request import Request
from shoal.server.engine.build import build_engine
from shoal.server.engine.memory import plan_kv_cache, scheduled_groups
from shoal.server.settings import resolve
from tests.fakes import params
from tests.model.families import write
from tests.model.oracles import random_config

MIB = 1024 * 1024
# One layer that sees all and three that see a window: four groups of one layer.
WINDOWS = random_config(num_layers=4, window=[0, 64, 64, 64])


def planned(**others: Any) -> tuple[int, int]:
    settings = resolve({"model": "any", "scheduler": {"max_num_seqs": 3, "max_chunk_tokens": 32}, **others})
    return plan_kv_cache(settings, WINDOWS, dtype="float32", max_model_len=512, free=2**40)


def test_requests_of_full_length_get_all_blocks_that_they_need_at_once() -> None:
    """A window of 64 and a chunk of 32 stand in seven blocks of 16, and 512 tokens in 32."""
    assert scheduled_groups(WINDOWS) == (CacheGroup(), *[CacheGroup(window=64)] * 3)
    num_blocks, num_bytes = planned()
    assert num_blocks == 3 * (32 + 3 * 7)
    # Two KV heads of 8 numbers for keys and as many for values, in one layer.
    assert num_bytes == num_blocks * 16 * 2 * 2 * 8 * 4


def test_a_size_in_bytes_is_divided_into_blocks_of_one_group() -> None:
    num_blocks, num_bytes = planned(cache={"memory_mib": 8})
    assert num_bytes == num_blocks * bytes_per_block(WINDOWS, "float32", 16) == 8 * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("gemma3", tmp_path_factory.mktemp("gemma3"))


def built(folder: Path, **speculation: object) -> EngineCore:
    return build_engine(
        resolve(
            {
                "model": str(folder),
                "engine": {"backend": "torch", "threads": 1},
                "scheduler": {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_chunk_tokens": 8},
                "cache": {"block_size": 4, "num_blocks": 400},
                "speculation": speculation,
            }
        )
    ).core


def text(core: EngineCore) -> list[int]:
    request = Request("a", list(range(3, 63)), params(40), arrival_time=0.0)
    core.scheduler.add(request)
    while core.scheduler.num_unfinished:
        core.step()
        check_invariants(core.scheduler)
    return request.token_ids


def test_with_a_draft_model_all_layers_share_one_block_table(folder: Path) -> None:
    """The draft model uses the target's blocks, so that none may go back while it needs them."""
    plain = built(folder)
    drafted = built(folder, method="draft", draft_model=str(folder), num_spec_tokens=2)
    assert len(plain.scheduler.config.cache_groups) > 1
    assert not all(group.sees_all for group in plain.scheduler.config.cache_groups)
    assert drafted.scheduler.config.cache_groups == (CacheGroup(),)
    assert text(plain) == text(drafted)
    assert drafted.scheduler.stats().num_draft_tokens > 0
