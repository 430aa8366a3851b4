"""Fill-in-the-middle: how a model is asked for what stands between two texts.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle": a token before the text that comes
first, one before the text that comes last, and one after which the model writes what stands between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

# The three tokens as families spell them: Qwen and CodeGemma, StarCoder and Granite, SantaCoder, DeepSeek, CodeLlama.
SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
# With these such a text ends, whatever ends the model's chats.
ENDS = (
    *("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    *("<fim_pad>", "<fim-pad>", "<file_sep>", "▁<EOT>"),
)


class Middle(NamedTuple):
    """Token ids.

    Attributes:
        ends: with which the text ends that the model writes.
    """

    prefix: int
    suffix: int
    middle: int
    ends: frozenset[int]

    def prompt(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """What asks for the tokens between these."""
        return [self.prefix, *before, self.suffix, *after, self.middle]


def find_middle(token_id: Callable[[str], int | None]) -> Middle | None:
    """How the model of a vocabulary is asked; None if it was not trained for it."""
    for spelling in SPELLINGS:
        prefix, suffix, middle = map(token_id, spelling)
        if prefix is not None and suffix is not None and middle is not None:
            ends = {one for text in ENDS if (one := token_id(text)) is not None}
            return Middle(prefix, suffix, middle, frozenset(ends | {prefix, suffix, middle}))
    return None
