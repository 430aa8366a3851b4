"""The `shoal` command as a whole: help, JSON for programs, completion, and what it loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shoal.cli import main
from shoal.terminal import show

SHOAL = Path(sys.executable).with_name("shoal")
COMMANDS = sorted(main.list_commands(click.Context(main)))


@pytest.mark.parametrize(
    "command", [*sorted({*COMMANDS} - {"cluster", "completion", "rank"}), "cluster up", "cluster status"]
)
def test_every_command_that_prints_something_can_print_json(command: str) -> None:
    found: click.Command | None = main
    for name in command.split():
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), name)
    assert found is not None
    assert "--json" in {name for option in found.params for name in option.opts}


@pytest.fixture
def _nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the environment, nor by a file."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    ("args", "code", "kind", "param"),
    [
        (["serve", "--port", "-1"], 2, "ConfigError", "server.port"),
        (["serve", "--no-such"], 2, "ConfigError", None),
        (["models", "nowhere"], 2, "BadParameter", None),
        (["complete", "x", "--url", "http://127.0.0.1:1"], 1, "UnreachableError", None),
        (["chat", "--url", "localhost"], 1, "UnsendableError", None),
        (["bench", "--url", "http://127.0.0.1:1"], 2, "UnreachableError", None),
        (["bench", "--requests", "0"], 2, "BadParameter", None),
        (["simulate", "--costs", "nowhere"], 2, "LoadTestError", None),
        (["loadtest", "--resume"], 2, "UsageError", None),
        (["policies", "--no-such"], 2, "NoSuchOption", None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("_nothing_is_set")
def test_errors_are_json_where_json_is_asked_for(args: list[str], code: int, kind: str, param: str | None) -> None:
    plain = CliRunner().invoke(main, args)
    result = CliRunner().invoke(main, [args[0], "--json", *args[1:]])
    assert plain.exit_code == result.exit_code == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    error = json.loads(line)["error"]
    assert (error["type"], error["param"]) == (kind, param)
    assert error["message"].split("\n")[0] in " ".join(plain.stderr.split())


def test_help_has_colours_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for args in (["--help"], ["models", "--help"], ["serve", "--help"]):
        assert "\x1b[" in CliRunner().invoke(main, args, color=True).stdout
        assert "\x1b[" not in CliRunner().invoke(main, args).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in CliRunner().invoke(main, ["models", "--help"], color=True).stdout


def test_a_table_in_a_pipe_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "a sentence of [many] words that no terminal would show on a single line, " * 3
    show("Title", [{"name": "a", "count": 7, "why": sentence}, {"name": "[b]", "count": None, "why": "0.25"}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["", "Title", f"name  count  why{' ' * (len(sentence) - 4)}".rstrip().ljust(len(lines[2]))]
    assert [line.split()[:2] for line in lines[3:]] == [["a", "7"], ["[b]", "–"]]  # noqa: RUF001
    assert sentence.strip() in lines[3]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mod"], ["models"]),
        (["serve", "--max-num"], ["--max-num-seqs", "--max-num-batched-tokens", "--max-num-waiting"]),
        (["serve", "--log-format", "j"], ["json"]),
        (["bench", "--endpoint", ""], ["chat", "completions"]),
        (["completion", "f"], ["fish"]),
    ],
)
def test_a_real_bash_completes(words: list[str], expected: list[str], tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    script = f"""
eval "$(shoal completion bash)"
COMP_WORDS=(shoal {" ".join(word or '""' for word in words)})
COMP_CWORD={len(words)}
"$(complete -p shoal | sed 's/.*-F \\([^ ]*\\).*/\\1/')" shoal
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    environment = {**os.environ, "PATH": f"{SHOAL.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells(shell: str) -> None:
    printed = CliRunner().invoke(main, ["completion", shell]).stdout
    assert "_SHOAL_COMPLETE" in printed
    if shutil.which(shell):
        subprocess.run([shell, "-n", "-c", printed], check=True)


def test_commands_load_no_more_than_they_need() -> None:
    """Help needs no tables, a list of models no server, and `shoal bench` nothing of the extra `loadtest`."""
    script = """
import sys
from click.testing import CliRunner
from shoal.cli import main
assert CliRunner().invoke(main, ["--help"]).exit_code == 0
print(*({"rich", "numpy", "fastapi", "torch"} & sys.modules.keys()))
assert CliRunner().invoke(main, ["models"]).exit_code == 0
print(*({"fastapi", "torch", "tokenizers", "zmq"} & sys.modules.keys()))
import shoal.loadtest.bench
print(*({"locust", "gevent", "matplotlib", "scipy", "tqdm", "psutil", "jinja2"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines(), done.stderr) == (["", "", ""], "")
