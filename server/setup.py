"""Reads what the API needs of the checkpoint."""

from __future__ import annotations

from math import inf
from pathlib import Path

from shoal.model.checkpoint.config import load_config, load_generation_defaults
from shoal.model.checkpoint.find import checkpoint_name, find_draft, resolve_checkpoint
from shoal.model.checkpoint.format import open_checkpoint
from shoal.model.checkpoint.pooling import load_pooling
from shoal.model.speculation.config import MOST_SPEC_TOKENS
from shoal.model.text.grammar import GrammarCompiler
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import ConfigError
from shoal.server.batches.sharing import SharedEngine
from shoal.server.batches.store import Batches
from shoal.server.constraints import Constraints
from shoal.server.engine.admission import Admission
from shoal.server.engine.client import EngineClient
from shoal.server.engine.router import Router
from shoal.server.fingerprint import fingerprint
from shoal.server.limits import make_allowances
from shoal.server.metrics import Metrics
from shoal.server.peers import Peers
from shoal.server.prompts import Prompts
from shoal.server.reading import BodyReader
from shoal.server.receipts import Receipts
from shoal.server.responses.store import ResponseStore
from shoal.server.service import Service, unix_time
from shoal.server.settings import Settings
from shoal.server.streams import StreamStore
from shoal.server.templates import TemplateRenderer
from shoal.server.tools.dialect import find_dialect
from shoal.server.tracing import make_tracer


def build_service(
    settings: Settings, num_engines: int | None = None, peers: Peers | None = None
) -> tuple[Service, EngineClient | Router]:
    """Read what the API needs of the checkpoint; the engine reads the rest.

    Args:
        num_engines: that are there from the start, if it is not for the settings to say; `make_client` makes others.
        peers: of the cluster that the process is part of.

    Returns:
        The service, whose clients the owners of the engines connect, and all of these as one.

    Raises:
        CheckpointError: a file is missing or malformed.
        ConfigError: the draft model has another tokenizer.
    """
    checkpoint = resolve_checkpoint(settings.model)
    opened = open_checkpoint(checkpoint)
    tokenizer = Tokenizer.load(opened)
    if settings.speculation.method == "draft":
        _check_draft(tokenizer, find_draft(settings.speculation.draft_model))
    config = settings.server
    model_names = config.served_model_name or (checkpoint_name(settings.model, checkpoint),)
    metrics = Metrics(model_names[0], _num_spec_tokens(settings))
    api_keys = config.all_api_keys()
    numbers = range(settings.engine.engines if num_engines is None else num_engines)
    router = Router([make_client(str(number), settings, metrics) for number in numbers], metrics)
    clients = router.clients
    own: EngineClient | Router = clients[0] if len(clients) == 1 else router
    engine = SharedEngine(own, clients)
    model, defaults = load_config(opened), load_generation_defaults(opened)
    compiler = GrammarCompiler(lambda: tokenizer, model.vocab_size, defaults.eos_token_ids or model.eos_token_ids)
    templates = TemplateRenderer(tokenizer)
    streams = StreamStore(settings.server.resume_grace_seconds)
    service = Service(
        settings=settings,
        api_keys=api_keys,
        allowances=make_allowances(config, api_keys, engine),
        model_names=model_names,
        fingerprint=(model_fingerprint := fingerprint(checkpoint, settings)),
        receipts=Receipts(settings, model_names[0], model_fingerprint),
        reader=BodyReader(config.unknown_fields),
        config=model,
        defaults=defaults,
        tokenizer=tokenizer,
        constraints=Constraints(compiler),
        templates=templates,
        prompts=Prompts(tokenizer, templates, engine, model.vocab_size),
        dialect=find_dialect(tokenizer, config.tool_format, config.reasoning_format),
        clients=clients,
        engine=engine,
        metrics=metrics,
        tracer=make_tracer(config, model_names[0]),
        batches=Batches(settings.server.data_folder),
        started=unix_time(),
        streams=streams,
        responses=ResponseStore(streams),
        pooling=load_pooling(opened),
        peers=peers,
    )
    return service, own


def make_client(name: str, settings: Settings, metrics: Metrics) -> EngineClient:
    """A client of the engine that has this name in metrics."""
    config = settings.server
    client = EngineClient(name, metrics, hang_seconds=settings.engine.hang_seconds)
    client.admission = Admission(config.max_queue_seconds or inf, config.max_queue_tokens or inf)
    client.names_all = not (config.api_keys or config.api_keys_file)
    return client


def _num_spec_tokens(settings: Settings) -> int:
    """Most tokens of a proposal; 1 without speculation."""
    speculation = settings.speculation
    return 1 if speculation.method == "off" else speculation.num_spec_tokens or MOST_SPEC_TOKENS


def _check_draft(tokenizer: Tokenizer, draft: Path) -> None:
    """A vocabulary of the same size may be another one, of which nothing would ever be accepted."""
    if not Tokenizer.load(draft).has_vocabulary_of(tokenizer):
        raise ConfigError(
            f"draft_model {draft} has another vocabulary than the model: they need the same tokenizer",
            param="draft_model",
        )
