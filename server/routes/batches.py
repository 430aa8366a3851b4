"""/v1/files and /v1/batches: OpenAI's Batch API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.batches.store import BatchStore
from shoal.server.errors import BatchesUnavailableError
from shoal.server.keys import known_key, owner_name
from shoal.server.routes.answer import whole
from shoal.server.service import Service
from shoal.server.wire.batches import MAX_NAME_CHARS, BatchBody, BatchQuery, Deleted, FileObject, FileQuery
from shoal.server.wire.parsing import read_body


def batches_router(service: Service) -> APIRouter:
    router = APIRouter()

    def owner(request: Request) -> str:
        """Whose files and batches a request sees."""
        return owner_name(known_key(request, service.api_keys))

    @router.post("/v1/files")
    async def create_file(request: Request) -> Response:
        try:
            async with request.form(max_files=1, max_fields=8, max_part_size=1024) as form:
                upload = _check_form(dict(form))
                name = upload.filename or ""
                return whole(await service.batches.ask(lambda store: store.add_file(owner(request), name, upload.file)))
        except HTTPException as error:
            raise InvalidRequestError(f"the form is malformed: {error.detail}") from error
        except OSError as error:
            raise BatchesUnavailableError(f"the file cannot be kept: {error.strerror}") from error

    @router.get("/v1/files")
    async def list_files(request: Request) -> Response:
        query = read_body(FileQuery, dict(request.query_params), strict=False)
        return whole(await service.batches.ask(lambda store: store.files(owner(request), query)))

    @router.get("/v1/files/{file_id}")
    async def get_file(request: Request, file_id: str) -> Response:
        return whole(await service.batches.ask(lambda store: store.file(owner(request), file_id)))

    @router.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> Response:
        await service.batches.ask(lambda store: store.delete_file(owner(request), file_id))
        return whole(Deleted(file_id))

    @router.get("/v1/files/{file_id}/content")
    async def get_content(request: Request, file_id: str) -> Response:
        file = await service.batches.ask(lambda store: store.file(owner(request), file_id))
        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(content(file), headers=headers, media_type="application/octet-stream")

    async def content(file: FileObject) -> AsyncGenerator[bytes, None]:
        after = -1
        while pieces := await service.batches.ask(partial(BatchStore.pieces, file_id=file.id, after=after)):
            yield b"".join(data for _, data in pieces)
            after = pieces[-1][0]

    @router.post("/v1/batches")
    async def create_batch(request: Request) -> Response:
        body = await service.reader.read(request, BatchBody)
        batch = await service.batches.ask(lambda store: store.add_batch(owner(request), body, service.model_name))
        service.batches.changed.set()
        return whole(batch)

    @router.get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        query = read_body(BatchQuery, dict(request.query_params), strict=False)
        return whole(await service.batches.ask(lambda store: store.batches(owner(request), query)))

    @router.get("/v1/batches/{batch_id}")
    async def get_batch(request: Request, batch_id: str) -> Response:
        return whole(await service.batches.ask(lambda store: store.batch(owner(request), batch_id)))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        batch = await service.batches.ask(lambda store: store.cancel(owner(request), batch_id))
        service.batches.changed.set()
        return whole(batch)

    return router


def _check_form(fields: dict[str, UploadFile | str]) -> UploadFile:
    """The file in an upload's form.

    Raises:
        InvalidRequestError: a field is missing, unknown, or asks for what the server does not do.
    """
    upload, purpose = fields.pop("file", None), fields.pop("purpose", None)
    if not isinstance(upload, UploadFile):
        raise InvalidRequestError("missing required field: file", param="file")
    if purpose != "batch":
        raise InvalidRequestError("purpose: expected 'batch'", param="purpose")
    if len(upload.filename or "") > MAX_NAME_CHARS:
        raise InvalidRequestError(f"file: expected a name of at most {MAX_NAME_CHARS} characters", param="file")
    for name in fields:
        raise InvalidRequestError(f"unrecognized request argument: {name}", param=name)
    return upload
