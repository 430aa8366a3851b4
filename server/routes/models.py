"""GET /v1/models, /server_info and /tokenizer_info: what is served, and how; POST /reset_prefix_cache."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.server.embeddings import METHODS
from shoal.server.engine.client import EngineClient
from shoal.server.routes.answer import whole
from shoal.server.service import Service
from shoal.server.wire.responses import (
    Capabilities,
    EngineStatus,
    ModelCard,
    ModelList,
    ServerInfo,
    SpecialToken,
    TokenizerInfo,
)


def models_router(service: Service) -> APIRouter:
    router = APIRouter()
    root = str(resolve_checkpoint(service.settings.model))

    def card(name: str) -> ModelCard:
        has_template = bool(service.tokenizer.chat_template.sources)
        return ModelCard(
            id=name,
            root=root,
            created=service.started,
            max_model_len=service.engine.ready.limits.max_model_len,
            capabilities=Capabilities(
                chat=has_template,
                tools=has_template,
                reasoning=has_template and service.dialect.thinks,
                fill_in_middle=service.tokenizer.middle is not None,
                embeddings=service.pooling in METHODS,
            ),
            display_name=name,
            created_at=datetime.fromtimestamp(service.started, UTC).isoformat().replace("+00:00", "Z"),
        )

    def status(client: EngineClient) -> EngineStatus:
        pid = client.ready.pid or None if client.is_connected else None
        return EngineStatus(client.name, client.is_connected, pid, client.num_unfinished)

    @router.get("/v1/models")
    async def list_models() -> Response:
        cards = [card(name) for name in service.model_names]
        return whole(ModelList(cards, first_id=cards[0].id, last_id=cards[-1].id))

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        service.check_model(name)
        return whole(card(name if name in service.model_names else service.model_name))

    @router.get("/server_info")
    async def get_server_info() -> Response:
        ready, settings = service.engine.ready, service.settings.sections()
        del settings["server"]["api_keys"]
        return whole(
            ServerInfo(
                version("shoal"),
                service.model_name,
                ready.num_parameters,
                ready.backend,
                ready.warning,
                ready.kv_cache_bytes,
                ready.limits,
                settings,
                [status(client) for client in service.clients],
                msgspec.UNSET if service.peers is None else await service.peers.describe(),
            )
        )

    @router.get("/tokenizer_info")
    async def get_tokenizer_info() -> Response:
        tokenizer = service.tokenizer
        sources = tokenizer.chat_template.sources
        return whole(
            TokenizerInfo(
                tokenizer_class="PreTrainedTokenizerFast",
                vocab_size=tokenizer.vocab_size,
                model_max_length=service.engine.ready.limits.max_model_len,
                is_byte_level=tokenizer.is_byte_level,
                special_tokens=tokenizer.chat_template.variables,
                added_tokens_decoder={i: SpecialToken(text) for i, text in tokenizer.special_tokens.items()},
                chat_template=sources.get("default"),
                chat_templates=sources,
            )
        )

    @router.post("/reset_prefix_cache", response_class=Response)
    async def reset_prefix_cache() -> Response:
        service.engine.forget_prefixes()
        return Response(status_code=200)

    return router
