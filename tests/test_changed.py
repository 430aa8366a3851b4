"""Which tests `make quick` runs."""

from __future__ import annotations

import pytest

from tests.changed import ALWAYS, affected_by


@pytest.mark.parametrize(
    ("changed", "nearest", "others", "left_out"),
    [
        (
            "scheduler/scheduler.py",
            "tests/model/test_generation.py",
            "tests/scheduler/test_fair.py",
            "tests/e2e/test_wire.py",
        ),
        ("model/step/rows.py", "tests/model/test_rows.py", "tests/model/test_config.py", "tests/training/test_echo.py"),
        ("model/native/pool.cpp", ALWAYS, "tests/model/test_native_bits.py", "tests/clients/test_cli.py"),
        (
            "model/training/echo.py",
            "tests/training/test_echo.py",
            "tests/training/test_corpus.py",
            "tests/model/test_rows.py",
        ),
        ("src/shoal/extras.py", "tests/test_package.py", None, "tests/model/test_rows.py"),
        ("tests/clients/fake_server.py", "tests/clients/test_cli.py", None, "tests/model/test_rows.py"),
        ("tests/e2e/test_chat.py", "tests/e2e/test_chat.py", None, "tests/e2e/test_wire.py"),
        ("README.md", ALWAYS, None, "tests/test_build.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_imports_a_change_comes_first(changed: str, nearest: str, others: str | None, left_out: str) -> None:
    chosen = affected_by([changed])
    assert ALWAYS in chosen and left_out not in chosen
    assert others is None or chosen.index(nearest) < chosen.index(others)
    assert nearest in chosen
