"""API keys as requests carry them."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b
from secrets import compare_digest

from fastapi import Request


def known_key(request: Request, api_keys: Collection[str]) -> str | None:
    """Which of these keys the request carries as a bearer token or as `x-api-key`, if it carries one."""
    given = [request.headers.get("x-api-key", "")]
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        given.append(token)
    known = None
    for key in api_keys:  # all of them, so that the time says nothing
        for one in given:
            if compare_digest(one.encode("latin-1"), key.encode()):
                known = key
    return known


def owner_name(api_key: str | None) -> str:
    """What is kept beside the files and batches of a key, in its place; empty where the server asks for no key."""
    return blake2b(api_key.encode(), digest_size=16).hexdigest() if api_key is not None else ""
