"""Which tests `make quick` runs."""

from __future__ import annotations

import pytest

from tests.changed import ALWAYS, affected_by


@pytest.mark.parametrize(
    ("changed", "some", "none"),
    [
        ("tests/e2e/test_chat.py", "tests/e2e/test_chat.py", "tests/e2e/test_wire.py"),
        ("model/step/rows.py", "tests/model/test_rows.py", "tests/clients/test_client.py"),
        ("clients/__init__.py", "tests/clients/test_client.py", "tests/e2e/test_chat.py"),
        ("src/shoal/extras.py", "tests/test_package.py", "tests/model/test_rows.py"),
        ("model/native/pool.cpp", "tests/model/test_native_bits.py", "tests/model/test_rows.py"),
        ("tests/clients/fake_server.py", "tests/clients/test_cli.py", "tests/model/test_rows.py"),
    ],
)
def test_a_change_is_tested_where_it_is_imported(changed: str, some: str, none: str) -> None:
    chosen = affected_by([changed])
    assert {ALWAYS, some} <= set(chosen)
    assert none not in chosen


def test_a_change_in_no_module_has_no_affected_by_its_own() -> None:
    assert affected_by(["README.md", "gone/for_ever.py"]) == [ALWAYS]
