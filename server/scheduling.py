"""From a request body to `SchedulingParams`: what the scheduler may know of a request."""

from __future__ import annotations

from hashlib import blake2b

from shoal.scheduler.output import SchedulingParams
from shoal.server.wire.embeddings import EmbeddingsBody
from shoal.server.wire.requests import GenerationBody


def resolve_scheduling(
    body: GenerationBody | EmbeddingsBody, api_key: str | None, *, shares_prefixes: bool = False
) -> SchedulingParams:
    """What the body says of its urgency, and which client it is of.

    The API key names the client, because a client cannot pretend to have several.  Where the server asks for no key,
    `user` names it.  `cached_tokens` and the time to the first token tell whether a prefix was asked for before: so
    prefixes are found under the same key only, unless keys share them, and with the same `cache_salt`.
    """
    key = api_key if api_key and not shares_prefixes else ""
    return SchedulingParams(
        client=client_of(api_key) if api_key else _name("user", body.user) if body.user else "",
        cache_salt=_name("salt", f"{key} {body.cache_salt or ''}") if key or body.cache_salt else "",
        priority=body.priority,
        ttft_slo_ms=body.ttft_slo_ms,
        tpot_slo_ms=body.tpot_slo_ms,
    )


def client_of(api_key: str) -> str:
    """The name of the client that an API key stands for."""
    return _name("key", api_key)


def _name(kind: str, value: str) -> str:
    """Short, and not the value itself: names get into logs, and a key must not."""
    return blake2b(f"{kind} {value}".encode(), digest_size=8).hexdigest()
