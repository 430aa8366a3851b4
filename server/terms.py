"""On which terms a call is served: what the policy may know of it, the time that it has, and what its key may ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from fastapi import Request

from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import SchedulingParams
from shoal.server.keys import known_key
from shoal.server.limits import UNLIMITED, Allowance
from shoal.server.scheduling import resolve_scheduling
from shoal.server.service import Service
from shoal.server.wire.embeddings import EmbeddingsBody
from shoal.server.wire.requests import MAX_TIMEOUT_SECONDS, GenerationBody

if TYPE_CHECKING:
    from opentelemetry.context import Context

TIMEOUT_HEADER = "x-request-timeout"


@dataclass(frozen=True)
class Terms:
    """The terms of a call.

    Attributes:
        timeout: seconds in which it must be finished.
        allowance: from which it takes the tokens that it may need; at its end it gives back what it did not need.
        die_after: output tokens after which the engine dies; an injected fault.
        context: the trace that its span belongs to, where calls are traced.
    """

    scheduling: SchedulingParams = field(default_factory=SchedulingParams)
    timeout: float = inf
    allowance: Allowance = UNLIMITED
    die_after: int | None = None
    context: Context | None = None


def resolve_terms(service: Service, request: Request, body: GenerationBody | EmbeddingsBody) -> Terms:
    """What a request and its body say.

    Raises:
        InvalidRequestError: a header makes no sense.
    """
    api_key = known_key(request, service.api_keys)
    return Terms(
        resolve_scheduling(body, api_key, shares_prefixes=service.settings.cache.share_prefixes),
        min(_seconds(request.headers.get(TIMEOUT_HEADER)), inf if body.timeout is None else body.timeout),
        service.allowances.get(api_key, UNLIMITED),
        getattr(request.state, "die_after", None),
        service.tracer.context(request.headers) if service.tracer is not None else None,
    )


def _seconds(header: str | None) -> float:
    """The timeout that a header gives."""
    if header is None:
        return inf
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER}: expected seconds, above 0 and at most {MAX_TIMEOUT_SECONDS}, not {header[:32]!r}",
            param=TIMEOUT_HEADER,
        )
    return seconds
