"""Texts made from the functions of a file: instruction pairs from docstrings, and bare functions.

In a pair a docstring asks for a function and its code answers, or the other way round.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator

_MOST_LINES = 40  # of a function
_SYSTEM = "You are Shoal, a small model that writes Python."

_ASK_FOR_CODE = (
    "Write a Python function `{signature}`. {summary}",
    "{summary} Write it as a Python function named `{name}`.",
    "Write `{name}` in Python: {summary}",
    "{summary}",
    "Implement this function.\n```python\n{stub}\n```",
)
_ASK_FOR_SUMMARY = (
    "What does this function do?\n```python\n{code}\n```",
    "Explain in one sentence.\n```python\n{code}\n```",
)


def instruction_pairs(source: str) -> Iterator[tuple[str, ...]]:
    """The instruction pairs of a file's functions: (question, answer), sometimes (system, question, answer).

    A function gives one pair if it has a docstring and is of moderate length.  The form of the question depends on the
    function's name and place, so that a file always gives the same pairs.
    """
    lines = source.split("\n")
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            summary = _summary(node)
            code = _code_without_docstring(node, lines)
            if summary and code:
                yield _pair(node, summary, code)


def bare_functions(source: str) -> Iterator[tuple[str]]:
    """The functions and classes of a file's top level that are of moderate length, each as a separate text."""
    lines = source.split("\n")
    for node in _parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            end = node.end_lineno or node.lineno
            if 3 <= end - begin < _MOST_LINES:
                yield ("\n".join(lines[begin - 1 : end]) + "\n",)


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return ast.parse(source)


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The docstring's first sentence or paragraph, on one line; empty if it says too little or too much."""
    docstring = inspect.cleandoc(ast.get_docstring(node) or "")
    summary = " ".join(docstring.split("\n\n")[0].split())
    return summary if 20 <= len(summary) <= 300 and summary.isprintable() else ""


def _code_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's own lines, moved to the left margin; empty if there is no body, or if it is too long."""
    docstring = node.body[0]
    end = node.end_lineno or node.lineno
    if len(node.body) < 2 or docstring.end_lineno is None or end - docstring.end_lineno > _MOST_LINES:
        return ""
    # A docstring that shares a line with other code cannot be cut out by lines.
    if docstring.lineno == node.lineno or node.body[1].lineno == docstring.end_lineno:
        return ""
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : end]
    margin = " " * node.col_offset
    if any(line and not line.startswith(margin) for line in kept):
        return ""
    return "\n".join(line[node.col_offset :] for line in kept)


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, summary: str, code: str) -> tuple[str, ...]:
    choice = node.lineno * 31 + sum(node.name.encode())
    signature = f"{node.name}({', '.join(argument.arg for argument in node.args.args)})"
    stub = f'def {signature}:\n    """{summary}"""'
    if choice % 4 == 0:
        question = _ASK_FOR_SUMMARY[choice // 4 % len(_ASK_FOR_SUMMARY)].format(code=code)
        answer = summary
    else:
        template = _ASK_FOR_CODE[choice // 4 % len(_ASK_FOR_CODE)]
        question = template.format(signature=signature, summary=summary, name=node.name, stub=stub)
        answer = f"```python\n{code}\n```"
    return (_SYSTEM, question, answer) if choice % 7 == 0 else (question, answer)
