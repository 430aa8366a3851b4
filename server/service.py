"""What every route needs, made once at the start and handed to them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.model.architecture import ModelConfig
from shoal.model.checkpoint.config import GenerationDefaults
from shoal.model.text.tokenizer import Tokenizer
from shoal.server.batches.sharing import SharedEngine
from shoal.server.batches.store import Batches
from shoal.server.constraints import Constraints
from shoal.server.engine.client import EngineClient
from shoal.server.errors import ModelNotFoundError
from shoal.server.limits import Allowance
from shoal.server.metrics import Metrics
from shoal.server.peers import Peers
from shoal.server.prompts import Prompts
from shoal.server.reading import BodyReader
from shoal.server.receipts import Receipts
from shoal.server.responses.store import ResponseStore
from shoal.server.settings import Settings
from shoal.server.streams import StreamStore
from shoal.server.templates import TemplateRenderer
from shoal.server.tools.dialect import Dialect
from shoal.server.tracing import Tracer


@dataclass(frozen=True)
class Service:
    """The model as the API sees it, and the engine that runs it."""

    settings: Settings
    api_keys: tuple[str, ...]
    allowances: Mapping[str | None, Allowance]  # see `make_allowances`
    model_names: Sequence[str]
    fingerprint: str
    receipts: Receipts
    reader: BodyReader
    config: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer
    constraints: Constraints
    templates: TemplateRenderer
    prompts: Prompts
    dialect: Dialect
    clients: Sequence[EngineClient]
    engine: SharedEngine  # all of them
    metrics: Metrics
    tracer: Tracer | None
    batches: Batches
    started: int
    streams: StreamStore
    responses: ResponseStore
    pooling: str  # see `load_pooling`
    peers: Peers | None = None  # of a cluster

    @property
    def model_name(self) -> str:
        """The name that answers have."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ModelNotFoundError: this server does not serve it.
        """
        if name and name not in self.model_names and not self.settings.server.any_model:
            served = " and ".join(map(repr, self.model_names))
            raise ModelNotFoundError(f"the model {name!r} does not exist: this server serves {served}", param="model")


def new_id(prefix: str) -> str:
    """A new id; of OpenAI's oldest APIs a hyphen follows the prefix, of others it has its own sign at its end."""
    return f"{prefix}{'' if prefix.endswith('_') else '-'}{secrets.token_hex(12)}"


def unix_time() -> int:
    return int(time.time())
