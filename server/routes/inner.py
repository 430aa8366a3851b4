"""Requests that the server makes to its own endpoints: lines of batches, and streams that are made again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Message

from shoal.server.service import Service

Endpoints = Mapping[str, Callable[[Request], Awaitable[Response]]]


def endpoints(service: Service, *routers: Callable[[Service], APIRouter]) -> Endpoints:
    """The endpoints of these routers by their paths, without the limits of API keys."""
    unlimited = replace(service, allowances={})
    routes = [route for router in routers for route in router(unlimited).routes]
    return {route.path: route.endpoint for route in routes if isinstance(route, APIRoute)}


def inner_request(path: str, body: bytes, headers: Mapping[str, str], **state: Any) -> Request:
    """What an endpoint would have got from a client that stays."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.get_running_loop().create_future()

    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": path, "headers": raw, "state": state}, receive)
