"""Real text for prompts: the modules and docstrings of the running Python's standard library.

They are a part of the corpus that the bundled models were trained on, and they are on every machine.  Another release
of Python has other texts; a saved workload has its prompts in it, and is the same everywhere.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from shoal.loadtest.errors import WorkloadError

Tokenize = Callable[[str], list[int]]

_MAX_CHARS_PER_TOKEN = 8  # passages are so long that no tokenizer makes fewer tokens of them than are asked for
_NUM_TRIES = 100


@cache
def modules() -> tuple[Path, ...]:
    """The modules at the top of the library that have some length, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(sorted(path for path in root.glob("*.py") if path.stat().st_size > 2**13))


def code(rng: Random, num_chars: int) -> str:
    """At least so many characters of modules, from the start of a line on."""
    return _passage(rng, num_chars, lambda path: path.read_text("utf-8"))


def prose(rng: Random, num_chars: int) -> str:
    """At least so many characters of docstrings, from the start of a line on."""
    return _passage(rng, num_chars, docstrings)


@cache
def docstrings(path: Path) -> str:
    """All docstrings of a module, in order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, documented)]
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def _passage(rng: Random, num_chars: int, read: Callable[[Path], str]) -> str:
    passage = ""
    while len(passage) < num_chars:
        lines = read(rng.choice(modules())).splitlines(keepends=True)
        passage += "".join(lines[rng.randrange(len(lines)) :]) if lines else ""
    return passage[: num_chars + 1].lstrip()


def cut(text: str, num_tokens: int, tokenize: Tokenize) -> tuple[str, list[int]] | None:
    """The longest beginning of a text that has exactly so many tokens, and these; None if no beginning has.

    Nothing is assumed of the tokenizer but that more text seldom makes fewer tokens: what is returned was tokenized as
    it stands.
    """
    low, high = 0, min(len(text), num_tokens * _MAX_CHARS_PER_TOKEN) + 1
    found = None
    while high - low > 1:
        middle = (low + high) // 2
        token_ids = tokenize(text[:middle])
        if len(token_ids) == num_tokens:
            found = (text[:middle], token_ids)
        low, high = (middle, high) if len(token_ids) <= num_tokens else (low, middle)
    return found


def passage(source: Callable[[Random, int], str], rng: Random, num_tokens: int, tokenize: Tokenize) -> str:
    """Text from `source` of exactly so many tokens.

    Raises:
        WorkloadError: the tokenizer cannot make so many of any text.
    """
    return prompt("", source, rng, num_tokens, tokenize)[0]


def prompt(
    opening: str, source: Callable[[Random, int], str], rng: Random, num_tokens: int, tokenize: Tokenize
) -> tuple[str, list[int]]:
    """The opening, and as much text from `source` after it as makes exactly so many tokens; with these.

    Where the opening alone has as many or more, as much of it as makes them.

    Raises:
        WorkloadError: the tokenizer cannot make so many of any text.
    """
    for _ in range(_NUM_TRIES):
        if found := cut(opening + source(rng, num_tokens * _MAX_CHARS_PER_TOKEN), num_tokens, tokenize):
            return found
    raise WorkloadError(f"no text was found of which the tokenizer makes exactly {num_tokens} tokens")
