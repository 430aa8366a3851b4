"""Where there is not enough memory for a step, the step fails, and the process goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.model.backends.native_library import supported_isas

ROOT = Path(__file__).resolve().parents[2]
# The process may have no more address space than it has when the step begins.  What is of any size is mapped on its own
# (MALLOC_MMAP_THRESHOLD_), so that no memory that was freed takes its place.
SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
from shoal.model.backends.native_backend import NativeBackend
from tests.model.batches import Paged, sampling_batch
from tests.model.oracles import random_record

case, num_threads = sys.argv[1], int(sys.argv[2])
if case == "arrays":
    shape, prompts, how = {"hidden_size": 512}, [[7] * 600], {}
else:
    shape, prompts = {"hidden_size": 16, "vocab_size": 100_000}, [[token] for token in range(8)]
    how = {"temperature": 1.0, "top_k": 50, "num_logprobs": 3}
record = random_record(**shape)
parts = [(str(at), prompt, 0) for at, prompt in enumerate(prompts)]
batch = Paged(num_blocks=128, block_size=16).batch(parts, all_logits=False)
sampling, greedy = sampling_batch(len(prompts), **how), sampling_batch(len(prompts))

def backend():
    return NativeBackend(record, num_blocks=128, block_size=16, num_threads=num_threads)

tried = backend()
if case == "tiles":
    tried.execute(batch, greedy)  # makes all arrays but the tiles' own
limits = resource.getrlimit(resource.RLIMIT_AS)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, limits[1]))
try:
    tried.execute(batch, sampling)
except MemoryError as error:
    said = str(error)
resource.setrlimit(resource.RLIMIT_AS, limits)
print(said)
again, expected = tried.execute(batch, sampling), backend().execute(batch, sampling)
assert (again.token_ids == expected.token_ids).all()
assert case == "arrays" or (again.top_logprobs == expected.top_logprobs).all()
"""


@pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells a process how large it is")
@pytest.mark.parametrize(("case", "num_threads"), [("arrays", 1), ("tiles", 2)])
def test_a_step_without_memory_fails_and_may_be_taken_again(case: str, num_threads: int) -> None:
    """In the arrays of the step, and in what a thread of the pool makes for its tile."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, case, str(num_threads)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "there is not enough memory\n"
