"""From the tokens of a request to its text, up to the first stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from shoal.model.text.tokenizer import IncrementalDetokenizer, Tokenizer
from shoal.scheduler.output import FinishReason, RequestOutput, TokenLogprobs
from shoal.server.engine.journal import Journal

MAX_SCORED = 64  # tokens of one delta of a prompt's echo, so that none takes long to make into an answer
NUM_CONTEXT_TOKENS = 8  # of the prompt, before which a token's text depends on nothing


class StopStrings:
    """Looks for stop strings in text that comes piece by piece, and holds back what might become one.

    A stop string may lie across any number of pieces.  The one that is complete first counts; of those that one piece
    completes, the one that begins first.

    Attributes:
        found: the one that ended the text.
    """

    def __init__(self, stop_strings: Sequence[str], *, are_shown: bool = False) -> None:
        self.found: str | None = None
        self._stop_strings = stop_strings
        self._are_shown = are_shown
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece; returns the text that is certain, and whether a stop string ends it."""
        if not self._stop_strings:
            return text, False
        text = self._held + text
        found = [(at, at + len(stop), stop) for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            begin, end, self.found = min(found)
            return text[: end if self._are_shown else begin], True
        split = len(text) - self._num_held(text)
        self._held = text[split:]
        return text[:split], False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stop_strings)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0


@dataclass(slots=True)
class Scored:
    """A token, the place of its text in the choice's text, and its log-probabilities; a prompt's first has none."""

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class Delta:
    """What is new in one choice.

    Attributes:
        token_ids: the new output tokens; what a stop string cut off is among them.
        scored: the new tokens, prompt tokens before the others; filled if log-probabilities were asked for.
        stop_string: the one that ended the text.
    """

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_string: str | None = None

    def add(self, later: Delta) -> None:
        """Add what came after it in the same choice."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.scored += later.scored
        self.finish_reason = later.finish_reason
        self.stop_string = later.stop_string


class Choice:
    """Turns the tokens of one request into text, up to the first stop string.

    Args:
        echo: the prompt's text, if it is to stand before the rest.
        shown: special tokens that stand in the text.
        shows_stop: whether what ends the text, a stop string or token, stands in it.
        interval: tokens that are given together, after the first.
        scores_text_only: whether log-probabilities are given of the tokens of the text alone, and with it.
    """

    def __init__(
        self,
        index: int,
        journal: Journal,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        echo: str | None,
        *,
        shown: Collection[int] = frozenset(),
        shows_stop: bool = False,
        interval: int = 1,
        scores_text_only: bool = False,
    ) -> None:
        self.index = index
        self.journal = journal
        self.num_tokens = 0
        self.is_finished = False
        self._tokenizer = tokenizer
        self._stop_strings = StopStrings(stop_strings, are_shown=shows_stop)
        self._shows_stop = shows_stop
        self._interval = interval
        self._scores_text_only = scores_text_only
        self._held: deque[Scored] = deque()
        self._num_certain = 0
        self._is_cut = False
        self._echo = echo
        self._num_chars = 0
        self._num_given = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer, shown=shown)
        # Some tokenizers write a token otherwise at the start of a text than in the middle of it.
        for token_id in journal.request.prompt_token_ids[-NUM_CONTEXT_TOKENS:]:
            self._detokenizer.push(token_id)

    def feed(self, output: RequestOutput) -> Iterable[Delta]:
        """The text of a piece of news: one delta, or several where it comes with the echo of a long prompt.

        After a stop string the choice is finished, whatever the engine still does.
        """
        if self._echo is not None and (output.token_ids or output.finish_reason):
            return self._with_echo(output, self._echo)
        return (self._with_news(output, Delta(self.index, "")),)

    def is_due(self, delta: Delta) -> bool:
        """Whether what was fed since the last one that was given is to be given."""
        if delta.finish_reason:
            return True
        is_first = self._num_given == 0
        return bool(delta.text or delta.scored) and (is_first or self.num_tokens - self._num_given >= self._interval)

    def _with_echo(self, output: RequestOutput, prompt: str) -> Iterator[Delta]:
        delta = Delta(self.index, "")
        for part in self._echoed(prompt):
            if delta.text or delta.scored:
                yield delta
            delta = part
        yield self._with_news(output, delta)

    def _with_news(self, output: RequestOutput, delta: Delta) -> Delta:
        self._take(output, delta)
        self._num_certain += len(delta.text)
        is_whole = delta.finish_reason and not self._is_cut
        while self._held and (is_whole or self._held[0].text_offset < self._num_certain):
            delta.scored.append(self._held.popleft())
        return delta

    def _take(self, output: RequestOutput, delta: Delta) -> None:
        scored = self._held if self._scores_text_only else delta.scored
        is_stopped = output.finish_reason is FinishReason.STOP
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            is_shown = self._shows_stop or not is_stopped or position < len(output.token_ids) - 1
            if output.logprobs and (is_shown or not self._scores_text_only):
                scored.append(Scored(token_id, self._num_chars, output.logprobs[position]))
            if not is_shown:
                break  # the stop token itself is not part of the text
            if self._append(delta, self._detokenizer.push(token_id)):
                self._finish(delta, "stop")
                return
        if output.finish_reason is None:
            return
        if self._append(delta, self._detokenizer.flush()):
            self._finish(delta, "stop")
            return
        delta.text += self._stop_strings.flush()
        self._finish(delta, "stop" if output.finish_reason is FinishReason.STOP else "length")

    def take_token_ids(self) -> list[int]:
        """The output tokens that were fed since the last call."""
        begin, self._num_given = self._num_given, self.num_tokens
        return self.journal.output_token_ids[begin : self.num_tokens]

    def _append(self, delta: Delta, text: str) -> bool:
        """Add what is certain of the text; whether a stop string ends it."""
        certain, self._is_cut = self._stop_strings.push(text)
        delta.text += certain
        self._num_chars += len(text)
        return self._is_cut

    def _finish(self, delta: Delta, reason: Literal["stop", "length"]) -> None:
        self.is_finished = True
        delta.finish_reason = reason
        delta.stop_string = self._stop_strings.found

    def _echoed(self, prompt: str) -> Iterator[Delta]:
        self._echo = None
        self._num_chars = len(prompt)
        delta = Delta(self.index, prompt)
        if self.journal.request.params.num_prompt_logprobs is not None:
            detokenizer, offset = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=False), 0
            logprobs = [None, *self.journal.prompt_logprobs]
            count = self.journal.request.params.num_logprobs
            for token_id, entry in zip(self.journal.request.prompt_token_ids, logprobs, strict=True):
                if len(delta.scored) == MAX_SCORED:
                    yield delta
                    delta = Delta(self.index, "")
                delta.scored.append(Scored(token_id, offset, entry and _first(entry, count)))
                text = detokenizer.push(token_id)
                if not self._tokenizer.is_special(token_id) or prompt.startswith(text, offset):
                    offset += len(text)  # else it was added, and does not stand in the prompt
        yield delta


def _first(logprobs: TokenLogprobs, count: int | None) -> TokenLogprobs:
    """The log-probabilities with the first `count` alternatives: `prompt_logprobs` may have asked for more."""
    return replace(logprobs, top_token_ids=logprobs.top_token_ids[:count], top_logprobs=logprobs.top_logprobs[:count])
