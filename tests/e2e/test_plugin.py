"""The pytest plug-in in a project that is not this one: pytest runs there as its developers run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import clean_environment

PROJECT = """
import json
import httpx
import openai
import pytest

from shoal import ShoalClient


@pytest.fixture(scope="session")
def shoal_settings():
    return {"model": MODEL, "num_blocks": 512, "max_num_seqs": 4}


def openai_client(server, **options):
    return openai.OpenAI(
        base_url=server.base_url, api_key="unused", http_client=openai.DefaultHttpxClient(trust_env=False), **options
    )


def test_the_server_of_the_session(shoal_server):
    assert shoal_server.base_url == f"{shoal_server.url}/v1"
    assert shoal_server.client.complete("Z", max_tokens=4, temperature=0).choices[0].text
    assert "ready after" in shoal_server.log
    settings = shoal_server.fetch("server_info").json()["settings"]
    assert (settings["scheduler"]["max_num_seqs"], settings["engine"]["threads"]) == (4, 1)
    assert settings["scheduler"]["policy"] == "fcfs", "neither the file here nor the environment is read"


@pytest.mark.parametrize("script", ["500, ok", "ok"])
def test_it_takes_a_script_with_a_request(shoal_server, script, request):
    headers = {"X-Shoal-Fault": script, "X-Shoal-Fault-Scope": request.node.nodeid}
    with openai_client(shoal_server, max_retries=0, default_headers=headers) as client:
        if script != "ok":
            with pytest.raises(openai.InternalServerError):
                client.completions.create(model="cycle", prompt="Z")
        assert client.completions.create(model="cycle", prompt="Z").choices


def test_servers_of_a_test(start_shoal):
    server = start_shoal(faults="429*2, ok")
    other = start_shoal("503", api_keys=["a", "b"], enable_prefix_caching=False)
    with openai_client(server) as client:
        assert client.completions.create(model="cycle", prompt="Z", max_tokens=4, temperature=0).choices[0].text
    assert server.log.count("Fault(name='429'") == 2
    with openai_client(other, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="cycle", prompt="Z")
        with pytest.raises(openai.InternalServerError):
            client.with_options(api_key="b").completions.create(model="cycle", prompt="Z")


def test_what_does_not_start_says_why(start_shoal):
    start_shoal(faults="teapot")


def test_what_fails_shows_the_log(shoal_server):
    assert False, "on purpose"


def test_what_fails_without_a_server_shows_none():
    assert False, "on purpose, too"
"""


def run_pytest(folder: Path, *args: str) -> tuple[int, str]:
    """Run pytest with the plug-in, and with no other: it may be installed, and it may not."""
    command = [sys.executable, "-P", "-m", "pytest", "-p", "shoal.testing.plugin", "-p", "no:cacheprovider", *args]
    environment = clean_environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", SHOAL_SCHEDULER__POLICY="fair")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_project_of_its_own(tmp_path: Path, cycle_folder: Path) -> None:
    (tmp_path / "test_program.py").write_text(PROJECT.replace("MODEL", repr(str(cycle_folder))))
    (tmp_path / "shoal.toml").write_text('[scheduler]\npolicy = "sjf"\n')
    code, printed = run_pytest(tmp_path, "-W", "error", "--tb=short")
    assert code == 1 and "3 failed, 4 passed" in printed, printed
    refused, failed, alone = (
        printed.partition(f"_ {name} _")[2].partition("\n____")[0]
        for name in (
            "test_what_does_not_start_says_why",
            "test_what_fails_shows_the_log",
            "test_what_fails_without_a_server_shows_none",
        )
    )
    assert "ServerFailedError: the server ended with exit code 2" in refused
    assert "fault_script: unknown fault 'teapot'" in refused
    assert "- log of Shoal at http://127.0.0.1:" in failed and "ready after" in failed
    assert "on purpose, too" in alone and "log of Shoal" not in alone


def test_it_costs_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n"
        "def test_nothing():\n"
        "    assert not {'httpx', 'numpy', 'click', 'zmq', 'shoal.testing.server'} & set(sys.modules)\n"
    )
    assert run_pytest(tmp_path)[0] == 0
