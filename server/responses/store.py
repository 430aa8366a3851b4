"""Responses that are kept for later turns, and for those who ask for them.  Nothing here survives a restart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakValueDictionary

import msgspec

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.errors import NotFoundError
from shoal.server.streams import StreamStore
from shoal.server.wire.items import Item, ResponseObject

MAX_RESPONSES = 4096
MAX_BYTES = 64 * 2**20  # of all responses and their conversations together
RESPONSE_BYTES, ITEM_BYTES = 2048, 256  # that each counts as besides its JSON


@dataclass(eq=False)
class Kept:
    """One response.

    Attributes:
        owner: the API key that asked for it.
        response: as it is now.
        before: the items of the conversation that it answers.
        size: bytes that it counts as.
    """

    owner: str | None
    response: ResponseObject
    before: Sequence[Item]
    size: int = 0


class ResponseStore:
    """Keeps responses, the newest of those that have ended.

    Args:
        streams: holds the events of those that are made in the background.
    """

    def __init__(self, streams: StreamStore) -> None:
        self._streams = streams
        self._kept: dict[str, Kept] = {}
        self._items: WeakValueDictionary[tuple[str | None, str], Item] = WeakValueDictionary()
        self._num_bytes = 0

    def keep(self, kept: Kept) -> None:
        """Keep a response from now on."""
        self._kept[kept.response.id] = kept
        self.measure(kept)

    def measure(self, kept: Kept) -> None:
        """Take note of what has become of a response, if it is still kept."""
        if kept.response.id not in self._kept:
            return
        self._num_bytes -= kept.size
        items = [*kept.before, *kept.response.output]
        encoded = msgspec.json.encode((kept.response, kept.before))
        kept.size = len(encoded) + RESPONSE_BYTES + ITEM_BYTES * len(items)
        self._num_bytes += kept.size
        for item in items:
            self._items[kept.owner, item.id] = item
        self._make_room()

    def find(self, response_id: str, owner: str | None) -> Kept:
        """Return the response of this id.

        Raises:
            NotFoundError: there is none that this owner asked for.
        """
        kept = self._kept.get(response_id)
        if kept is None or kept.owner != owner:
            raise NotFoundError(f"no response {response_id[:100]!r} is kept: it never was, or others took its place")
        return kept

    def conversation(self, response_id: str, owner: str | None) -> list[Item]:
        """The items up to the end of a response.

        Raises:
            InvalidRequestError: it is not there, or has not ended.
        """
        param = "previous_response_id"
        try:
            kept = self.find(response_id, owner)
        except NotFoundError as error:
            raise InvalidRequestError(f"{param}: {error.message}", param=param) from error
        if not kept.response.is_ended:
            raise InvalidRequestError(f"{param}: this response has not ended yet", param=param)
        return [*kept.before, *kept.response.output]

    def item(self, item_id: str, owner: str | None, path: str) -> Item:
        """Return the item of this id in any response.

        Args:
            path: where a request names it.

        Raises:
            NotFoundError: there is none that this owner knows of.
        """
        item = self._items.get((owner, item_id))
        if item is None:
            raise NotFoundError(
                f"{path}.id: no item {item_id[:100]!r} is kept: send the item itself instead of a reference",
                param="input",
            )
        return item

    def forget(self, kept: Kept) -> None:
        """Let go of a response, and abort it if it has not ended."""
        if self._kept.pop(kept.response.id, None) is None:
            return
        self._num_bytes -= kept.size
        if kept.response.background:
            with suppress(NotFoundError):
                self._streams.forget(self._streams.find(kept.response.id, kept.owner))

    def _make_room(self) -> None:
        """Let go of the oldest that have ended while there are too many."""
        while self._num_bytes > MAX_BYTES or len(self._kept) > MAX_RESPONSES:
            oldest = next((kept for kept in self._kept.values() if kept.response.is_ended), None)
            if oldest is None:
                return
            self.forget(oldest)
