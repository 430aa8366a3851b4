"""How many examples of a law are tried: a quarter of them in `make test`, and all in `make test-all`."""

from __future__ import annotations

share = 4  # tests/conftest.py sets it to 1 where the long tests run too


def examples(number: int) -> int:
    """Of `number` examples, as many as this run tries."""
    return max(number // share, 1)
