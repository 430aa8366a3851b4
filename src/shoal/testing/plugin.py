"""A pytest plug-in: fixtures that start real Shoal servers, with faults where a test asks for them (docs/faults.md).

    def test_it_is_patient(start_shoal):
        server = start_shoal(faults="429*2, ok")
        assert my_program(server.base_url).succeeds

Pytest loads it wherever Shoal is installed, so it imports nothing of Shoal until a fixture is used.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shoal.testing.server import ServerProcess

# What suits small servers of which several may run at once; any of it may be set otherwise.
DEFAULTS = {"fault_header": True, "threads": 1, "drain_seconds": 0}
NUM_LOG_LINES = 40


class StartShoal:
    """Starts servers.  Neither a `shoal.toml` nor the environment sets anything of them.

    Attributes:
        servers: those that were started.
    """

    def __init__(self, folders: pytest.TempPathFactory, settings: dict[str, Any]) -> None:
        self.servers: list[ServerProcess] = []
        self._folders = folders
        self._settings = DEFAULTS | settings

    def __call__(self, faults: str | None = None, **settings: Any) -> ServerProcess:
        """Start a server, and wait until it is ready.

        Args:
            faults: a script of the faults that its requests meet, such as `"429*2, ok"`.
            settings: of `shoal serve`, by their names: `model="smollm2-135m"`, `max_num_seqs=8`, `api_keys=["a", "b"]`.

        Raises:
            ServerFailedError: it cannot start with these settings; the message has the last lines of its log.
        """
        from shoal.testing.server import ServerProcess, serve_options  # noqa: PLC0415

        folder = self._folders.mktemp("shoal")
        (folder / "empty.toml").touch()
        chosen = {"config": folder / "empty.toml"} | self._settings | settings
        if faults is not None:
            chosen["fault_script"] = faults
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        port = chosen.pop("port", None)
        server = ServerProcess(serve_options(chosen), folder / "log", port=port, environment=environment)
        self.servers.append(server)
        return server.wait_ready()

    def end(self) -> None:
        for server in self.servers:
            server.end()


@pytest.fixture(scope="session")
def shoal_settings() -> dict[str, Any]:
    """Settings of all servers that these fixtures start, by their names: override it in conftest.py."""
    return {}


@pytest.fixture(scope="session")
def _start_session_shoal(
    tmp_path_factory: pytest.TempPathFactory, shoal_settings: dict[str, Any]
) -> Iterator[StartShoal]:
    start = StartShoal(tmp_path_factory, shoal_settings)
    yield start
    start.end()


@pytest.fixture(scope="session")
def shoal_server(_start_session_shoal: StartShoal) -> ServerProcess:
    """A Shoal server for the whole session: `base_url`, `url`, `client`, `log`."""
    return _start_session_shoal()


@pytest.fixture
def start_shoal(tmp_path_factory: pytest.TempPathFactory, shoal_settings: dict[str, Any]) -> Iterator[StartShoal]:
    """Start Shoal servers for one test: `start_shoal(faults="429*2, ok", max_num_seqs=8)`."""
    start = StartShoal(tmp_path_factory, shoal_settings)
    yield start
    start.end()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Let the report of a test that failed show what its servers logged last."""
    report = (yield).get_result()
    if report.failed:
        starts = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, StartShoal)]
        for server in [server for start in starts for server in start.servers]:
            lines = server.log.splitlines()[-NUM_LOG_LINES:]
            report.sections.append((f"log of Shoal at {server.url}", "\n".join(lines)))
