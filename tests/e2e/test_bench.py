"""`shoal bench` against a real server, which here refuses fields that it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.harness import Server, run_shoal


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_bench(tiny: Server, endpoint: str, tmp_path: Path) -> None:
    asked = ["--requests", "6", "--concurrency", "3", "--prompt-tokens", "200", "--max-tokens", "8"]
    code, printed = run_shoal(tmp_path, "bench", "--url", tiny.url, "--endpoint", endpoint, *asked, "--json")
    assert code == 0, printed
    found = json.loads(printed)
    assert (found["figures"]["requests"], found["counted_by"], found["errors"]) == (6, "usage", {})
    assert found["figures"]["prompt tokens"] / 6 == pytest.approx(200, rel=0.2)
    assert found["figures"]["output tokens"] <= 48
