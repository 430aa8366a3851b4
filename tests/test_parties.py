"""The table of `make test-clients`."""

from __future__ import annotations

import re

from tests.parties.table import FOLDER, PARTIES


def test_each_client_has_a_script_and_exact_requirements() -> None:
    scripts = {path for kind in ("[!_]*.py", "*.mjs") for path in FOLDER.glob(kind)}
    assert {party.script for party in PARTIES} == scripts - {FOLDER / "table.py", FOLDER / "environments.py"}
    for party in PARTIES:
        for requirement in party.requirements:
            assert re.search(r"(@|==)\d+(\.\d+)+(\.post\d+)?$", requirement), (party.name, requirement)
        assert party.version in party.requirements[0]
