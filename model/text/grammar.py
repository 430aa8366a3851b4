"""Compiles grammars for a model's tokens.

llguidance (https://github.com/guidance-ai/llguidance) follows a text with an Earley parser, over lexemes matched
by derivatives, and says which tokens may come next.  It is loaded with the first grammar, not while a server starts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import TYPE_CHECKING

from shoal.scheduler.errors import InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from shoal.model.text.tokenizer import Tokenizer

IDLE_SECONDS = 0.2  # without work, after which more is not expected at once, and `prepare` may hold it up
MAX_LEXER_STATES = 100_000  # of 1 to 2 kB
MAX_FAULT_CHARS = 200


class GrammarCompiler:
    """Makes matchers, of which each follows one text.

    Args:
        load: loads the tokenizer.
        vocab_size: of the model.
        eos_token_ids: tokens that end a text; a text may end where its grammar may.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._load = load
        self.vocab_size, self.eos_token_ids = vocab_size, frozenset(eos_token_ids)

    def prepare(self) -> None:
        """Make what every grammar needs.  It holds the interpreter: 30 ms for 2,048 tokens, 500 for 49,152."""
        _ = self._tokenizer

    def compile(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a text; others may work meanwhile, for the interpreter is not held.

        Raises:
            InvalidRequestError: the grammar cannot be used.
        """
        from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415

        limits = LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        first = matcher.deep_copy()
        if not matcher.is_error() and not any(first.compute_bitmask()):
            raise InvalidRequestError("no token can begin a text of this grammar")
        for one in (matcher, first):
            if one.is_error():
                raise InvalidRequestError(fault(one))
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer  # noqa: PLC0415

        tokenizer = self._load().to_json()
        return LLTokenizer(tokenizer, n_vocab=self.vocab_size, eos_token=sorted(self.eos_token_ids) or None)


def fault(matcher: LLMatcher) -> str:
    """What is wrong with a grammar, in one line."""
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:MAX_FAULT_CHARS]
