"""Puts an engine together, as the settings say."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shoal.model.checkpoint.config import load_generation_defaults
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.step.executor import ModelExecutor
from shoal.model.step.grammars import Grammars
from shoal.model.text.grammar import GrammarCompiler
from shoal.scheduler.config import SchedulerConfig, SchedulerLimits
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.scheduler import Scheduler
from shoal.server.engine.backends import TorchPlan, plan_backend
from shoal.server.engine.chrome_trace import ChromeTrace
from shoal.server.engine.memory import free_memory, plan_kv_cache, scheduled_groups
from shoal.server.engine.messages import Ready
from shoal.server.engine.parallel import plan_ranks
from shoal.server.engine.ranks import asked_split
from shoal.server.engine.speculation import plan_speculation
from shoal.server.settings import Settings

if TYPE_CHECKING:
    from shoal.model.text.tokenizer import Tokenizer

logger = logging.getLogger("shoal.engine")


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that is ready to run; `close` completes what it writes."""

    core: EngineCore
    ready: Ready
    grammars: Grammars
    close: Callable[[], None]


def build_engine(
    settings: Settings,
    progress: Callable[[str], None] = lambda what: None,
    lost: Callable[[str], None] = logger.error,
) -> BuiltEngine:
    """Load the model and put the engine together.

    Args:
        progress: told what is being done, for people.
        lost: told in words of a rank that ended, in a thread of its own; the next step raises SystemExit.

    Raises:
        CheckpointError, ConfigError: the checkpoint or a setting does not allow it.
    """
    progress(f"loading {settings.model}")
    opened = open_checkpoint(resolve_checkpoint(settings.model))
    record = load_checkpoint(opened)
    limit = record.config.max_position_embeddings
    max_model_len = settings.engine.max_model_len or limit
    if max_model_len > limit:
        raise ConfigError(f"max_model_len {max_model_len} exceeds the model's {limit} positions", param="max_model_len")
    record = replace(record, config=record.config.within(max_model_len))
    plan = plan_backend(settings.engine, settings.cache, record.config)
    closing, cache_copies = ExitStack(), 1.0
    if asked_split(settings.engine).num_ranks > 1:
        assert isinstance(plan, TorchPlan)
        plan = plan_ranks(plan, record.config, settings, lost, closing)
        cache_copies = plan.cache_copies(record.config)
    speculation = plan_speculation(settings.speculation, opened, record, max_model_len)
    models = [record.config]
    if speculation and speculation.draft:
        # One block table serves both models.
        record = replace(record, config=replace(record.config, keeps_all=True))
        models = [record.config, speculation.draft.config]
    free = int(free_memory(settings.engine.device) / cache_copies)
    num_blocks, num_bytes = plan_kv_cache(
        settings, *models, dtype=plan.kv_cache_dtype, max_model_len=max_model_len, free=free
    )
    limits = SchedulerConfig(
        **{name: getattr(settings.scheduler, name) for name in SchedulerLimits.__dataclass_fields__},
        num_blocks=num_blocks,
        block_size=settings.cache.block_size,
        cache_groups=scheduled_groups(record.config),
        max_model_len=max_model_len,
        enable_prefix_caching=settings.cache.enable_prefix_caching,
        num_lookahead_tokens=speculation.num_lookahead_tokens if speculation else 0,
    )
    policy = settings.scheduler.policy
    scheduler = Scheduler(limits, POLICIES[policy](limits, settings.knobs[policy]))
    progress(f"preparing {record.num_parameters / 1e6:.1f} M parameters and {num_bytes // 2**20} MiB of KV cache")
    backend = plan.create(record, num_blocks)
    eos_token_ids = load_generation_defaults(opened).eos_token_ids or record.config.eos_token_ids
    grammars = Grammars(GrammarCompiler(lambda: _load_tokenizer(opened), record.config.vocab_size, eos_token_ids))
    executor = ModelExecutor(
        backend,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=max_model_len,
        block_size=limits.block_size,
        num_groups=len(limits.cache_groups),
        speculate=lambda rows: grammars.beside(
            speculation.create(plan, backend, limits, rows) if speculation else None
        ),
    )
    ready = Ready(
        limits,
        record.num_parameters,
        num_bytes,
        plan.describe(record),
        plan.warning,
        plan.kv_cache_dtype,
        os.getpid(),
    )
    sections = settings.sections()
    about = {"limits": limits, "settings": {name: sections[name] for name in ("scheduler", "speculation")}}
    trace = None if settings.engine.trace is None else ChromeTrace(settings.engine.trace, about)
    core = EngineCore(scheduler, executor, time.monotonic, [] if trace is None else [trace])
    if trace is not None:
        closing.callback(trace.close)
    return BuiltEngine(core, ready, grammars, close=closing.close)


def _load_tokenizer(checkpoint: CheckpointFormat) -> Tokenizer:
    from shoal.model.text.tokenizer import Tokenizer  # noqa: PLC0415 (only grammars need it here)

    return Tokenizer.load(checkpoint)
