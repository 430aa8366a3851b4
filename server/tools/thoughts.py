"""Counts the tokens of thoughts."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.model.text.tokenizer import IncrementalDetokenizer, Tokenizer
from shoal.server.tools.reader import THINK, THINK_END


class ThoughtCounter:
    """How many of an answer's tokens are its thought, with the tags around it.

    Args:
        is_thinking: whether the prompt has begun the thought.

    Attributes:
        count: so far.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_thinking: bool) -> None:
        self.count = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        self._is_open = is_thinking
        self._is_over = False
        self._num_undecided = 0
        self._text = ""

    def push(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if self._is_over:
                return
            self._text += self._detokenizer.push(token_id)
            self._num_undecided += 1
            if not self._is_open:
                self._text = self._text.lstrip()
                self._is_open = self._text.startswith(THINK)
                self._is_over = not (self._is_open or THINK.startswith(self._text))
            if self._is_open:
                self.count, self._num_undecided = self.count + self._num_undecided, 0
                self._is_over = THINK_END in self._text
                self._text = self._text[-len(THINK_END) :]
