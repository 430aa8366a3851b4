"""What the engine is asked for an API call: one request for each prompt and choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.engine.messages import EngineRequest
from shoal.server.engine.packing import TokenIds
from shoal.server.sampling import choice_seed, resolve_sampling
from shoal.server.service import Service
from shoal.server.terms import Terms
from shoal.server.wire.requests import ChatBody, CompletionBody


def engine_requests(
    service: Service,
    body: CompletionBody | ChatBody,
    prompts: Sequence[tuple[str, TokenIds]],
    grammar: str,
    *,
    api_id: str,
    seed: int,
    terms: Terms,
) -> list[EngineRequest]:
    """The choices of the first prompt, then those of the next.  Arguments as `Generation` has them.

    Raises:
        InvalidRequestError: the parameters do not fit the model, the server or each other.
    """
    speculates = _speculates(service, body.speculation)
    all_params = resolve_sampling(
        body,
        seed=seed,
        prompt_lens=[len(token_ids) for _, token_ids in prompts],
        limits=service.engine.ready.limits,
        vocab_size=service.config.vocab_size,
        eos_token_ids=service.defaults.eos_token_ids or service.config.eos_token_ids,
        defaults=service.defaults,
        grammar=grammar,
        bad_words=service.tokenizer.spellings(body.bad_words),
    )
    return [
        EngineRequest(
            f"{api_id}-{index}-{i}",
            token_ids,
            replace(params, seed=choice_seed(seed, i)),
            scheduling=terms.scheduling,
            speculates=speculates,
            end_after=body.end_after,
            die_after=terms.die_after,
            timing=body.timing,
        )
        for index, ((_, token_ids), params) in enumerate(zip(prompts, all_params, strict=True))
        for i in range(body.n)
    ]


def _speculates(service: Service, wanted: str | None) -> bool:
    """Whether tokens may be drafted for a request that asks for this method, or for none in particular.

    Raises:
        InvalidRequestError: the server has another one.
    """
    method = service.settings.speculation.method
    if wanted not in (None, "off", method):
        raise InvalidRequestError(
            f"speculation {wanted!r} is not what this server was started with ({method!r}): leave it out, or say "
            f"'off' to do without",
            param="speculation",
        )
    return wanted != "off" and method != "off"
