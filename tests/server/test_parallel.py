"""One model over several processes: the same answers, more room, and what is sent."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from copy import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from shoal.model.backends.split import Split
from shoal.model.checkpoint.safetensors_file import read_safetensors
from shoal.server.llm import LLM, SamplingParams
from shoal.server.planner.costs import Costs
from shoal.server.planner.costs import Split as PlannedSplit
from tests.e2e.checkpoints import cycle_checkpoint, cycle_text
from tests.model.batches import Paged
from tests.model.oracles import random_record
from tests.model.ranks import BLOCK_SIZE, NUM_BLOCKS, on_ranks

# -- the same answers --------------------------------------------------------------------------------------------------


def answers(num_requests: int, **settings: Any) -> list[tuple[list[int], list[Any]]]:
    """Token ids and log-probabilities of greedy and drawn texts, of which many run at once."""
    words = "In", "The", "A", "def", "import"
    prompts = [f"{words[index % 5]} {index}" for index in range(num_requests)]
    params = [
        SamplingParams(max_tokens=12, temperature=0 if index % 3 == 0 else 0.9, top_p=0.9, seed=index, logprobs=2)
        for index in range(num_requests)
    ]
    with LLM(backend="torch", threads=1, num_blocks=512, max_num_waiting=512, **settings) as llm:
        return [(output.token_ids, output.scored) for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def alone() -> list[tuple[list[int], list[Any]]]:
    return answers(12)


@pytest.mark.parametrize(
    "ways",
    [
        {"tensor_parallel": 2},
        pytest.param({"expert_parallel": 2}, marks=pytest.mark.long),
        pytest.param({"pipeline_parallel": 3}, marks=pytest.mark.long),
        pytest.param({"tensor_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_processes_answer_as_one(ways: dict[str, int], alone: list[Any]) -> None:
    assert answers(len(alone), **ways) == alone


@pytest.mark.long
def test_200_requests() -> None:
    assert answers(200, tensor_parallel=2) == answers(200)


@pytest.mark.long
def test_drafts_are_those_of_one_process() -> None:
    for speculation in ("self", "draft"):
        assert answers(12, tensor_parallel=2, method=speculation) == answers(12, method=speculation)


# -- a model that does not fit -----------------------------------------------------------------------------------------

LARGE_BYTES, LIMIT_BYTES = 1200 * 2**20, 1050 * 2**20
SERVE = """
import resource, sys
from shoal import LLM, SamplingParams
folder, limit, num_ranks = sys.argv[1], *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
with LLM(folder, backend="torch", threads=1, num_blocks=4, max_model_len=64, tensor_parallel=num_ranks) as llm:
    print(llm.generate("Z", SamplingParams(temperature=0, max_tokens=12))[0].text)
"""


def enlarge(folder: Path, size: int, num_layers: int = 8) -> None:
    """Widen a checkpoint by blocks that add nothing, of zeros, which take no room on the disk."""
    config, file = folder / "config.json", folder / "model.safetensors"
    fields, small = json.loads(config.read_text()), read_safetensors(file)
    hidden = fields["hidden_size"]
    width = size // (4 * 3 * hidden * num_layers)
    config.write_text(json.dumps(fields | {"num_hidden_layers": num_layers, "intermediate_size": width}))
    tensors = {name: array for name, array in small.items() if ".layers." not in name}
    for name, layer in product((name for name in small if ".layers.0." in name), range(num_layers)):
        tensors[name.replace(".0.", f".{layer}.")] = small[name]
    header, contents, end = {}, {}, 0
    for name, array in tensors.items():
        zeros = {"up_proj": (width, hidden), "gate_proj": (width, hidden), "down_proj": (hidden, width)}
        shape = zeros.get(name.split(".")[-2])
        if shape is None:
            contents[end] = array.tobytes()
        begin, end = end, end + 4 * math.prod(shape or array.shape)
        header[name] = {"dtype": "F32", "shape": shape or array.shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.with_suffix(".new").open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for begin, content in contents.items():
            opened.seek(8 + len(encoded) + begin)
            opened.write(content)
        opened.truncate(8 + len(encoded) + end)
    file.with_suffix(".new").rename(file)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits count what Linux counts")
def test_ranks_serve_what_one_has_no_memory_for(tmp_path: Path) -> None:
    folder = cycle_checkpoint(tmp_path / "cycle")
    enlarge(folder, LARGE_BYTES)
    assert (folder / "model.safetensors").stat().st_size > LIMIT_BYTES

    def serve(num_ranks: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SERVE, folder, LIMIT_BYTES, num_ranks]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    assert serve(1).returncode != 0
    done = serve(2)
    assert done.stdout.strip() == cycle_text(12), done.stderr


# -- what is sent ------------------------------------------------------------------------------------------------------


def written() -> int:
    """Bytes that this process has written, to sockets too."""
    return int(Path("/proc/self/io").read_text().partition("wchar:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")
@pytest.mark.parametrize("num_tokens", [1, 64])
@pytest.mark.parametrize(
    ("fields", "split"),
    [
        ({"intermediate_size": 96}, Split(tensor=2)),
        ({"num_heads": 8, "num_kv_heads": 4, "qk_norm": "whole", "qk_norm_eps": 1e-5}, Split(tensor=4)),
        ({"num_experts": 4, "num_experts_per_tok": 2, "shared_size": 64}, Split(tensor=2)),
        ({"num_experts": 4, "num_experts_per_tok": 4}, Split(expert=2)),
        ({"num_experts": 4, "num_experts_per_tok": 4, "num_layers": 3}, Split(tensor=2, expert=2, pipeline=3)),
        ({"num_layers": 3}, Split(pipeline=2)),
    ],
    ids=str,
)
def test_bytes_on_the_wire_are_those_of_the_formula(fields: dict[str, Any], split: Split, num_tokens: int) -> None:
    """As the ranks count them, and as the kernel does, which sees what is around them too."""
    record = random_record(vocab_size=96, hidden_size=64, **fields)
    planned = PlannedSplit(split.tensor, split.expert, split.pipeline)
    formula = planned.gathered_bytes(Costs.of(record, "float32", 4), num_tokens, 1)
    assert formula is not None
    batch = Paged(NUM_BLOCKS, BLOCK_SIZE).batch([("a", list(range(num_tokens)), 0)], all_logits=False)
    with on_ranks(record, split) as ranks:
        ranks[0].forward(copy(batch))
        before = written()
        for _ in range(8):
            ranks[0].forward(copy(batch))
    by_kernel = (written() - before) / 8
    counted = sum(rank.num_bytes_sent for rank in ranks.values()) / 9
    assert counted == formula * split.num_ranks
    num_messages = 20 * split.num_ranks * split.stage_size * record.config.num_layers
    assert counted <= by_kernel <= counted + 100 * num_messages
