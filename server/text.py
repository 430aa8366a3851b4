"""Stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in text that comes piece by piece, and holds back what might become one.

    A stop string may lie across any number of pieces.  The one that is complete first counts; of those that one piece
    completes, the one that begins first.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece; returns the text that is certain, and whether a stop string ends it."""
        if not self._stop_strings:
            return text, False
        text = self._held + text
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
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
