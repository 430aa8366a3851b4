"""`python -m tests.hostile N [FIRST_SEED]`: N hostile requests against a server of its own, and a report."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from shoal.testing import ServerProcess
from tests.e2e.checkpoints import cycle_checkpoint
from tests.hostile.attacks import KEY
from tests.hostile.driver import Siege

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    num, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    model = cycle_checkpoint(folder / "model")
    options = ["--model", str(model), "--num-blocks", "2048", "--threads", "1", "--client-timeout-seconds", "20"]
    command = (sys.executable, "-m", "tests.hostile.watched", str(folder / "stalls"), "serve")
    environment = os.environ | {"SHOAL_SERVER__API_KEYS": KEY, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    with ServerProcess([*options], folder / "log", command=command, environment=environment) as server:
        engine, (memory, _) = server.engine_pid(), server.memory()
        siege, began = Siege(server.port), time.monotonic()
        asyncio.run(siege.run(range(first, first + num)))
        seconds = time.monotonic() - began
        assert server.engine_pid() == engine, "the engine died"
        assert "Traceback" not in server.log, server.log[server.log.index("Traceback") - 500 :][:3000]
        after, _ = server.memory()
    stalls = [(*map(int, line.split()[:2]), line) for line in (folder / "stalls").read_text().splitlines()]
    print(f"{num} attacks in {seconds:.0f} s; answers by status: {dict(sorted(siege.statuses.items()))}")
    print(f"memory of the API process: {memory:.0f} MiB before, {after:.0f} MiB after")
    print(
        f"/health took at most {1000 * siege.slowest:.0f} ms; {len(stalls)} stalls over 25 ms (wall and processor ms):"
    )
    for column, name in enumerate(("wall", "processor")):
        print(f"by {name} time:", *(line for *_, line in sorted(stalls, key=lambda one: -one[column])[:15]), sep="\n  ")
    print(f"log: {folder}/log")


if __name__ == "__main__":
    main()
