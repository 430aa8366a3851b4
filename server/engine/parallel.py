"""One model over several processes, of which the engine is the first: what is asked for, and how it comes about.

What each rank computes is `model/backends/split.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from shoal.model.architecture import ModelConfig
from shoal.model.backends.split import Shard, Split
from shoal.model.record import ModelRecord
from shoal.model.step.batch import Backend
from shoal.scheduler.errors import ConfigError
from shoal.server.engine.backends import PARALLEL, TorchPlan
from shoal.server.engine.rank_wire import Welcome
from shoal.server.engine.ranks import Crew, asked_split
from shoal.server.engine.share import threads_of_rank
from shoal.server.settings import Settings


@dataclass(frozen=True)
class ParallelPlan(TorchPlan):
    """The torch backend on several ranks, of which this process is the first.

    Attributes:
        lost: told of a rank that ended, in a thread of its own.
        closing: what ends with the engine; the ranks do.
    """

    split: Split
    settings: Settings
    lost: Callable[[str], None]
    closing: ExitStack

    def create(self, record: ModelRecord, num_blocks: int, sibling: Backend | None = None) -> Backend:
        """Rank 0's backend, when all ranks are ready; the sibling of one is not split.

        Raises:
            ConfigError: a rank does not join, or cannot load its part.
        """
        if sibling is not None:
            return super().create(record, num_blocks, sibling)
        from shoal.model.backends.torch_parallel import ParallelBackend  # noqa: PLC0415
        from shoal.model.backends.torch_ranks import connect, open_store  # noqa: PLC0415

        crew = Crew(self.settings, self.split, self.lost)
        self.closing.callback(crew.close)
        try:
            crew.gather()
            store, port = open_store()
            crew.welcome(self._welcome(record.config, num_blocks, port))
            shard = Shard(self.split, 0)
            backend = ParallelBackend(
                record,
                shard,
                connect(store, shard, self.config.device, crew.host),
                crew.tell,
                device=self.config.device,
                dtype=self.kv_cache_dtype,
                num_blocks=num_blocks,
                block_size=self.cache.block_size,
                num_threads=threads_of_rank(self.config),
            )
            crew.wait_loaded()
        except BaseException:
            crew.close()
            raise
        return backend

    def _welcome(self, model: ModelConfig, num_blocks: int, port: int) -> Welcome:
        split = self.split
        return Welcome(
            rank=1,
            split=(split.tensor, split.expert, split.pipeline),
            store_port=port,
            dtype=self.kv_cache_dtype,
            num_blocks=num_blocks,
            block_size=self.cache.block_size,
            max_model_len=self.settings.engine.max_model_len or model.max_position_embeddings,
            keeps_all=model.keeps_all,
        )

    def describe(self, record: ModelRecord) -> str:
        ways = ", ".join(f"{name} {getattr(self.config, name)}" for name in PARALLEL if getattr(self.config, name) > 1)
        return f"{super().describe(record)}, {self.split.num_ranks} ranks ({ways})"

    def cache_copies(self, model: ModelConfig) -> float:
        """How many times a plain backend's KV cache stands in the memory of this machine, or of rank 0's device."""
        layout = model.kv_layouts[0]
        each = Shard(self.split, 0).config(model).kv_layouts[0].num_elements / layout.num_elements
        share_memory = self.config.parallel_address is None and self.config.device == "cpu"
        return each * self.split.stage_size if share_memory else each / self.split.pipeline


def plan_ranks(
    plan: TorchPlan, model: ModelConfig, settings: Settings, lost: Callable[[str], None], closing: ExitStack
) -> ParallelPlan:
    """The plan of a backend, on the ranks that the settings ask for.

    Raises:
        ConfigError: the model cannot be split in this way, or a setting does not go with it.
    """
    split = asked_split(settings.engine)
    split.check(model)
    engine = settings.engine
    others = "standby" if engine.standby else "engines" if engine.engines > 1 else None
    if engine.parallel_address and others:
        raise ConfigError(
            f"{others} and parallel_address: a second engine needs ranks of its own, and these join one address",
            param=others,
        )
    return ParallelPlan(plan.config, plan.cache, plan.kv_cache_dtype, plan.warning, split, settings, lost, closing)
