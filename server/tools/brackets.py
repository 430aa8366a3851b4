"""Finds where JSON ends in a text that goes on behind it, and that comes piece by piece."""

from __future__ import annotations

import re

_OUTSIDE, _IN_STRING = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')


class Brackets:
    """Walks over the brackets of a text that grows, those in strings left out; each character is looked at once.

    Attributes:
        position: in the text, behind what has been looked at.
        depth: brackets that are open.
    """

    def __init__(self, depth: int = 0) -> None:
        self.position = 0
        self.depth = depth
        self._in_string = False

    def next(self, text: str) -> str | None:
        """The next bracket, behind which `position` is then; None if there is none yet."""
        while found := (_IN_STRING if self._in_string else _OUTSIDE).search(text, self.position):
            sign, at = found[0], found.start()
            if sign == "\\":
                if at + 1 == len(text):  # what it escapes has not come yet
                    self.position = at
                    return None
                self.position = at + 2
                continue
            self.position = at + 1
            if sign != '"':
                self.depth += 1 if sign in "{[" else -1
                return sign
            self._in_string = not self._in_string
        self.position = len(text)
        return None
