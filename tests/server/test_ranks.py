"""One model over several processes: joining, refusing, the same answers, and what is sent."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from copy import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from shoal.model.backends.split import Split
from shoal.model.checkpoint.safetensors_file import read_safetensors
from shoal.scheduler.errors import ConfigError
from shoal.server.engine.build import build_engine
from shoal.server.engine.rank import join
from shoal.server.engine.rank_wire import Hello, Loaded, Refused, Welcome
from shoal.server.engine.ranks import Crew
from shoal.server.llm import LLM, SamplingParams
from shoal.server.planner.costs import Costs
from shoal.server.planner.costs import Split as PlannedSplit
from shoal.server.settings import resolve
from tests.e2e.checkpoints import cycle_checkpoint, cycle_text, random_checkpoint
from tests.model.batches import Paged
from tests.model.oracles import random_record
from tests.model.ranks import BLOCK_SIZE, NUM_BLOCKS, on_ranks

ANOTHER = Hello("0.0.0", "abacus", "0123")
WELCOME = Welcome(1, (2, 1, 1), 1, "float32", 8, 16, 64, keeps_all=False)


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


# -- joining -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def address() -> str:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def crew_at(checkpoint: Path) -> Iterator[Callable[..., Crew]]:
    crews = []

    def make(address: str, num_ranks: int = 2, seconds: float = 30, lost: Any = print) -> Crew:
        engine = {"tensor_parallel": num_ranks, "parallel_address": address, "parallel_wait_seconds": seconds}
        crews.append(Crew(resolve({"model": str(checkpoint), "engine": engine}), Split(tensor=num_ranks), lost))
        return crews[-1]

    yield make
    for crew in crews:
        crew.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def test_a_rank_joins_and_its_end_is_told_at_once(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    told, is_told = [], threading.Event()
    crew = crew_at(address, lost=lambda words: (told.append(words), is_told.set()))
    gathering = pool.submit(crew.gather)
    joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
    gathering.result(30)
    crew.welcome(WELCOME)
    rank, welcome = joining.result(30)
    assert welcome == WELCOME
    rank.send(Loaded())
    crew.wait_loaded()
    rank.close()
    assert is_told.wait(30)
    assert told == [f"rank 1 at {crew.members[0].peer} has ended"]
    crew.close()


def test_strangers_are_sent_away(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    crew = crew_at(address)
    gathering = pool.submit(crew.gather)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x03\x00\x00\x00abc"):
        with closing(connected(address)) as stranger:
            stranger.sendall(words)
            with suppress(ConnectionError):
                assert stranger.recv(1) == b""
    joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
    gathering.result(30)
    crew.close()
    with pytest.raises(ConfigError, match="ended the connection"):
        joining.result(30)


@pytest.mark.parametrize("field", Hello.__struct_fields__)
def test_a_rank_that_differs_is_named_on_both_sides(
    field: str, address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    own = Hello.of(checkpoint, "cpu")
    other = Hello(**{name: getattr(ANOTHER if name == field else own, name) for name in Hello.__struct_fields__})
    gathering = pool.submit(crew_at(address).gather)
    words = f"does not fit: its {field} is {getattr(other, field)}, that of the engine {getattr(own, field)}"
    with pytest.raises(ConfigError, match=re.escape(words)):
        join(address, other, 30)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        gathering.result(30)
    assert caught.value.param == "parallel_address"


def test_fewer_ranks_than_asked(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
    with pytest.raises(ConfigError, match=f"1 of 2 ranks joined at {address} within 1 s"):
        crew_at(address, num_ranks=3, seconds=1).gather()
    with pytest.raises(ConfigError, match="1 of 2 ranks joined"):
        joining.result(30)


def test_a_rank_that_cannot_load(
    address: str, checkpoint: Path, crew_at: Callable[..., Crew], pool: ThreadPoolExecutor
) -> None:
    for last_words, named in ((Refused("no memory"), "no memory"), (None, "it has ended")):
        crew = crew_at(address)
        joining = pool.submit(join, address, Hello.of(checkpoint, "cpu"), 30)
        crew.gather()
        crew.welcome(WELCOME)
        rank, _ = joining.result(30)
        if last_words:
            rank.send(last_words)
        rank.close()
        with pytest.raises(ConfigError, match=f"rank 1 at .* cannot load its part: {named}"):
            crew.wait_loaded()
        crew.close()


def test_addresses_that_cannot_be(address: str, crew_at: Callable[..., Crew]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        for wrong in (f"127.0.0.1:{taken.getsockname()[1]}", "127.0.0.1:99999", "192.0.2.1:7000"):
            with pytest.raises(ConfigError, match=f"parallel_address {wrong}: cannot listen there"):
                crew_at(wrong).gather()
    for wrong in (address, "127.0.0.1:99999", "127.0.0.1:x"):
        with pytest.raises(ConfigError, match=f"no engine at {wrong}: "):
            join(wrong, ANOTHER, 0)


def test_what_listens_may_be_no_engine(pool: ThreadPoolExecutor) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        joining = pool.submit(join, f"127.0.0.1:{server.getsockname()[1]}", ANOTHER, 30)
        connection, _ = server.accept()
        with closing(connection):
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        with pytest.raises(ConfigError, match="is no engine of Shoal"):
            joining.result(30)


def test_settings_that_contradict_each_other(checkpoint: Path) -> None:
    for settings, words in (
        ({"backend": "native", "tensor_parallel": 2}, "tensor_parallel 2 is not for the native backend"),
        ({"backend": "torch", "tensor_parallel": 3}, "tensor_parallel 3: it does not divide"),
        ({"backend": "torch", "pipeline_parallel": 2, "standby": True, "parallel_address": "a:1"}, "standby and"),
        ({"backend": "torch", "pipeline_parallel": 2, "engines": 2, "parallel_address": "a:1"}, "engines and"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_engine(resolve({"model": str(checkpoint), "engine": settings, "cache": {"num_blocks": 64}}))


def connected(address: str) -> socket.socket:
    """A connection to what will listen there."""
    host, _, port = address.partition(":")
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)))
