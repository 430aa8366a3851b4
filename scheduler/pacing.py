"""How many tokens of prompts a step may compute, so that those who decode beside them need not wait long."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

# Fewer tokens of prompts take hardly less time: all weights are read for them.
_LEAST = 16
# Each new step that only decodes multiplies the weight of older ones by this, so that about the last ten count.
_KEPT = 0.9
# The number changes at most by this factor with a step, whose length may be chance.
_MOST_CHANGE = 2.0


class Pacing:
    """Changes the number with each step that was full of prompts or too long, in proportion to the wanted length.

    Where decoding takes more than half of the wanted length already, prompts may take as long as it does: such steps
    are twice as long as without them.  Only the lengths of steps depend on this, never a token.

    Args:
        target: wanted seconds of a step; 0 for no limit.
        most: tokens.

    Attributes:
        num_prompt_tokens: most tokens of prompts in the next step in which requests decode.
    """

    def __init__(self, target: float, most: int) -> None:
        self._target = target
        self._most = self.num_prompt_tokens = most
        self._plain: defaultdict[int, float] = defaultdict(float)  # seconds of decoding, by class of its rows

    def learn(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """Take in how long a step took."""
        if not num_prompt_tokens:
            self.learn_plain(num_decoding, [seconds])
        elif self._target:
            plain = self._plain[num_decoding.bit_length()]
            wanted, now = max(self._target, 2 * plain), self.num_prompt_tokens
            if num_prompt_tokens >= now or seconds > wanted:  # else nothing is known of fuller steps
                found = num_prompt_tokens * wanted / seconds if seconds > 0 else self._most
                found = min(max(found, now / _MOST_CHANGE, _LEAST), now * _MOST_CHANGE, self._most)
                self.num_prompt_tokens = int(found)

    def learn_plain(self, num_decoding: int, seconds: Iterable[float]) -> None:
        """Take in how long steps took in which so many requests decoded, and nothing else was done."""
        rows = num_decoding.bit_length()  # loads from one power of two to the next are alike
        plain = self._plain[rows]
        for one in seconds:
            plain = _KEPT * (plain or one) + (1 - _KEPT) * one
        self._plain[rows] = plain
