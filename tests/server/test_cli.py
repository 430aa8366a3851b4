from __future__ import annotations

import json

from click.testing import CliRunner

from shoal.scheduler.policies import describe_policies
from shoal.server.cli import policies


def test_the_policies_are_listed_with_a_line_each() -> None:
    result = CliRunner().invoke(policies)
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    assert lines == [[name, line] for name, line in describe_policies().items()]


def test_the_policies_as_json() -> None:
    assert json.loads(CliRunner().invoke(policies, "--json").output) == {"policies": describe_policies()}
