"""The items of an answer, whole or as the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from shoal.model.text.tokenizer import Tokenizer
from shoal.server.logprobs import chat_logprobs, plain_text
from shoal.server.text import Scored
from shoal.server.tools.answer import ChatAnswer
from shoal.server.wire.item_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ItemAdded,
    ItemDone,
    ItemEvent,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    TextDelta,
    TextDone,
)
from shoal.server.wire.items import (
    NO_LOGPROBS,
    CallItem,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    new_item_id,
)
from shoal.server.wire.responses import ToolCallDelta


class Output:
    """Makes items of what a chat says.

    Args:
        answer: reads the text.
        scores: of the tokens, if they were asked for.
        ids: draws those of items.

    Attributes:
        items: so far; the last one may go on.
    """

    def __init__(self, answer: ChatAnswer, scores: Scores, ids: Random) -> None:
        self.items: list[OutputItem] = []
        self._answer = answer
        self._scores = scores
        self._ids = ids
        self._logprobs: list[bytes] = []  # of the message that goes on
        self._events: list[ItemEvent] = []

    def feed(
        self, text: str, token_ids: Sequence[int], finish_reason: Literal["stop", "length"] | None
    ) -> list[ItemEvent]:
        """Add a piece of the text, and its tokens; returns what is new."""
        self._events = []
        self._scores.read(text)
        for delta in self._answer.deltas(text, token_ids, is_last=finish_reason is not None):
            if delta.reasoning_content:
                self._think(delta.reasoning_content)
            if delta.content:
                self._say(delta.content)
            for piece in delta.tool_calls or ():
                self._call(piece)
        if finish_reason is not None:
            is_cut = finish_reason == "length"
            if not self.items or (not is_cut and all(isinstance(item, ReasoningItem) for item in self.items)):
                self._begin_message()  # an answer that says nothing says so
            self.close("incomplete" if is_cut else "completed")
        return self._events

    def close(self, status: ItemStatus) -> None:
        """End the item that goes on, if one does."""
        item = self.items[-1] if self.items else None
        if item is None or item.status != "in_progress":
            return
        item.status = status
        index = len(self.items) - 1
        match item:
            case MessageItem(content=[OutputText() as part]):
                part.logprobs = _list(self._logprobs)
                self._logprobs = []
                done = TextDone(item_id=item.id, output_index=index, text=part.text, logprobs=part.logprobs)
                self._events += [done, PartDone(item_id=item.id, output_index=index, part=part)]
            case ReasoningItem(content=[thought]):
                self._events.append(ReasoningDone(item_id=item.id, output_index=index, text=thought.text))
                self._events.append(PartDone(item_id=item.id, output_index=index, part=thought))
            case CallItem():
                self._events.append(
                    ArgumentsDone(item_id=item.id, output_index=index, name=item.name, arguments=item.arguments)
                )
        self._events.append(ItemDone(output_index=index, item=item))

    # -- the kinds -------------------------------------------------------------------------------------------------

    def _think(self, text: str) -> None:
        item = self.items[-1] if self.items else None
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(id=new_item_id("rs", self._ids))
            self._begin(item, ReasoningText())
            item.content.append(ReasoningText())
        self._scores.take(text)
        item.content[0].text += text
        self._events.append(ReasoningDelta(item_id=item.id, output_index=len(self.items) - 1, delta=text))

    def _say(self, text: str) -> None:
        item = self.items[-1] if self.items else None
        if not isinstance(item, MessageItem):
            item = self._begin_message()
        logprobs = self._scores.take(text)
        self._logprobs += logprobs
        item.content[0].text += text
        self._events.append(
            TextDelta(item_id=item.id, output_index=len(self.items) - 1, delta=text, logprobs=_list(logprobs))
        )

    def _begin_message(self) -> MessageItem:
        item = MessageItem(id=new_item_id("msg", self._ids))
        self._begin(item, OutputText())
        item.content.append(OutputText())
        return item

    def _call(self, piece: ToolCallDelta) -> None:
        assert piece.function is not None
        if piece.id is not None:
            self._begin(CallItem(id=new_item_id("fc", self._ids), call_id=piece.id, name=piece.function.name or ""))
        item, text = self.items[-1], piece.function.arguments
        assert isinstance(item, CallItem)
        if text:
            item.arguments += text
            self._events.append(ArgumentsDelta(item_id=item.id, output_index=len(self.items) - 1, delta=text))

    def _begin(self, item: OutputItem, part: OutputText | ReasoningText | None = None) -> None:
        """Begin an item, with its only part if it has parts."""
        self.close("completed")
        self.items.append(item)
        index = len(self.items) - 1
        opening = item if isinstance(item, CallItem) else replace(item, content=[])
        self._events.append(ItemAdded(output_index=index, item=replace(opening)))
        if part is not None:
            self._events.append(PartAdded(item_id=item.id, output_index=index, part=part))


class Scores:
    """Tokens with their log-probabilities, which wait for what is made of their text.

    A message has those of its own tokens: what a thought, a call or their marks were written with is left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[tuple[int, bytes]] = []  # where the text of each token begins, and the JSON of its entry
        self._text, self._begin = "", 0  # what nothing was made of yet, and where it begins

    def add(self, scored: Sequence[Scored]) -> None:
        entries = chat_logprobs(self._tokenizer, scored, plain_text).content
        self._waiting += [
            (one.text_offset, msgspec.json.encode(entry)) for one, entry in zip(scored, entries, strict=True)
        ]

    def read(self, text: str) -> None:
        """Add the text that follows."""
        self._text += text

    def take(self, text: str) -> list[bytes]:
        """The entries of the tokens that a part of the text is of; they and those before it wait no longer.

        A token without text of its own, which begins a character or is not shown, goes with the text behind it.
        """
        skipped = max(self._text.find(text), 0)
        begin, rest = self._begin + skipped, self._text[skipped + len(text) :]
        end = self._begin + len(self._text) - len(rest)
        behind = [offset for offset, _ in self._waiting[1:]] + [end + len(rest)]
        taken = [
            entry
            for (offset, entry), after in zip(self._waiting, behind, strict=False)
            if offset < end and (offset >= begin or after > begin)
        ]
        self._waiting = [one for one in self._waiting if one[0] >= end]
        self._text, self._begin = rest, end
        return taken


def _list(entries: Sequence[bytes]) -> Raw:
    return Raw(b"[%b]" % b",".join(entries)) if entries else NO_LOGPROBS
