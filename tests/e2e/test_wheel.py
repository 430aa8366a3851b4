"""Shoal as it is installed: a wheel, made from an archive of the sources, in a fresh environment outside the clone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import harness, test_loadtest
from tests.e2e.harness import Server, clean_environment

ROOT = Path(__file__).parents[2]
profile = test_loadtest.profile

USER_PROGRAM = """\
import sys
import clients, shoal
from shoal import ShoalClient
with ShoalClient(sys.argv[1]) as client:
    print(client.complete("def", max_tokens=4).usage.num_output_tokens, clients.OWNER, shoal.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed; what it prints on standard output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment with its own Shoal and our dependencies; the harness starts that Shoal."""
    folder = tmp_path_factory.mktemp("installed")
    python = folder / "venv" / "bin" / "python"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("PYTHONPATH", raising=False)
        monkeypatch.setattr(harness, "SHOAL", str(python.with_name("shoal")))
        wheel = build_wheel(folder)
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
        run(
            *[sys.executable, "-m", "pip", "--python", python],
            *["install", "--no-index", "--no-deps", "--no-compile", wheel],
            cwd=folder,
        )
        site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
        (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        yield python


def build_wheel(folder: Path) -> Path:
    """Build the archive of the sources, then the wheel from what is in it, without compiling the libraries again."""
    code = "import sys, hatchling.build as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", code, "build_sdist", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    run("tar", "xzf", archive, cwd=folder)
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    for library in (ROOT / "model" / "native").glob("libshoal-*.so"):
        shutil.copy(library, unpacked / "src/shoal/model/native")
    run(sys.executable, "-c", code, "build_wheel", folder, cwd=unpacked)
    shutil.rmtree(unpacked)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_it_serves_a_user_with_a_room_of_the_same_name(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "clients.py").write_text("OWNER = 'the user'\n")
    (tmp_path / "program.py").write_text(USER_PROGRAM)
    server = Server(tmp_path, port=0)
    try:
        server.wait_ready()
        assert server.complete("import os", max_tokens=3)["usage"]["completion_tokens"] == 3
        printed = run(installed, "program.py", server.url, cwd=tmp_path)
    finally:
        server.close()
    assert printed.startswith("4 the user ")
    assert Path(printed.split()[-1]).is_relative_to(installed.parents[1])


def test_no_room_is_a_module_of_its_own(installed: Path, tmp_path: Path) -> None:
    rooms = sorted(path.name for path in (ROOT / "src" / "shoal").iterdir() if path.is_symlink())
    code = "import sys; from importlib.util import find_spec; print([r for r in sys.argv[1:] if find_spec(r)])"
    assert len(rooms) >= 5
    assert run(installed, "-P", "-c", code, *rooms, cwd=tmp_path) == "[]\n"


def test_it_says_what_an_extra_needs(installed: Path, tmp_path: Path) -> None:
    code = "from shoal.extras import install_command; print(install_command('torch'))"
    assert run(installed, "-c", code, cwd=tmp_path) == f"{installed} -m pip install torch==2.13.0\n"


def test_pytest_finds_the_plug_in(installed: Path, tmp_path: Path) -> None:
    assert "\nstart_shoal -- " in run(installed, "-m", "pytest", "--fixtures", cwd=tmp_path)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_profiled", [True, pytest.param(False, marks=pytest.mark.long)])
def test_it_measures_and_simulates(is_profiled: bool, profile: Path, installed: Path, tmp_path: Path) -> None:
    """With costs that are known, or with a profile that is taken first, for which six servers are started."""
    shoal, load = installed.with_name("shoal"), ["--policies", "fcfs", "--users", "2"]
    asked = ["--workload", "chat", "--requests", "4", "--output", "out", *(["--costs", profile] if is_profiled else [])]
    run(shoal, "loadtest", *load, *asked, "--", "--threads", "1", cwd=tmp_path)
    if not is_profiled:
        profile = next((tmp_path / "out").rglob("profile.json")).parent
    printed = run(shoal, "simulate", *load, "--replay", "out/workload-chat.jsonl", "--costs", profile, cwd=tmp_path)
    assert [result["setup"]["policy"] for result in json.loads(printed.splitlines()[-1])["results"]] == ["fcfs"]
