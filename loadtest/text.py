"""Real text for prompts: the modules and docstrings of the running Python's standard library.

The bundled models were trained on such text, and it is on every machine.  Another release of Python has other texts; a
saved workload contains its prompts, and is the same everywhere.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from shoal.loadtest.records import LoadTestError

Tokenize = Callable[[str], list[int]]
Prompt = tuple[str, list[int]]  # text, and the ids of its tokens

_MAX_CHARS_PER_TOKEN = 8  # no tokenizer makes fewer tokens of a passage of this length than are asked for
_NUM_TRIES = 100


@cache
def modules() -> tuple[Path, ...]:
    """The modules at the top of the library that are not short, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(sorted(path for path in root.glob("*.py") if path.stat().st_size > 2**13))


@cache
def code(module: Path) -> str:
    """The source of a module."""
    return module.read_text("utf-8")


@cache
def prose(module: Path) -> str:
    """All docstrings of a module, in order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(code(module))) if isinstance(node, documented)]
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def cut(text: str, num_tokens: int, tokenize: Tokenize) -> Prompt | None:
    """The longest beginning of a text that has exactly `num_tokens` tokens; None if no beginning has.

    The only assumption is that more text seldom makes fewer tokens: what is returned was tokenized as it is.
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


def prompt(
    source: Callable[[Path], str], rng: Random, num_tokens: int, tokenize: Tokenize, opening: str = ""
) -> Prompt:
    """The opening, and after it text of `source` from the start of some line on: exactly `num_tokens` tokens in all.

    Raises:
        LoadTestError: the tokenizer cannot make exactly that many tokens of any text.
    """
    for _ in range(_NUM_TRIES):
        passage = ""
        while len(passage) < num_tokens * _MAX_CHARS_PER_TOKEN:
            lines = source(rng.choice(modules())).splitlines(keepends=True)
            passage += "".join(lines[rng.randrange(len(lines)) :]) if lines else ""
        if found := cut(opening + passage.lstrip(), num_tokens, tokenize):
            return found
    raise LoadTestError(f"no text was found of which the tokenizer makes exactly {num_tokens} tokens")
