"""What the server says instead of starting: exit code 2 and one clear line."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from shoal.server.settings import declared
from tests.e2e.harness import run_shoal


def refusal(folder: Path, *args: str, **environment: str) -> str:
    """What `shoal serve` says when it refuses to start."""
    code, printed = run_shoal(folder, "serve", "--log-level", "error", *args, **environment)
    assert code == 2, printed
    assert "Traceback" not in printed
    (line,) = printed.splitlines()
    assert line.startswith("shoal serve: ")
    return line.removeprefix("shoal serve: ")


@pytest.fixture
def copy(tmp_path: Path, tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--model", "nowhere"],
            "'nowhere' is neither a checkpoint folder, nor a .gguf file, nor the name of a model;",
        ),
        (["--model", "."], "holds no config.json"),
        (["--policy", "lifo"], "unknown policy 'lifo'; known are deadline, fair, fcfs"),
        (["--host", "a..b"], "host: 'a..b' is not a host name"),
        (["--no-such-option"], "No such option '--no-such-option'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line(tmp_path: Path, args: list[str], said: str) -> None:
    assert said in refusal(tmp_path, *args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["--num-blocks", "1000000000"],
            r"num_blocks: a KV cache of 1000000000 blocks takes \d+ MiB, but only \d+ MiB",
        ),
        (["--memory-mib", "100000000"], r"memory_mib: .* but only \d+ MiB"),
        (["--max-model-len", "5000"], "max_model_len 5000 exceeds the model's 4096 positions"),
        (
            ["--backend", "native", "--block-size", "8"],
            "block_size 8 is not for the native backend, .* a multiple of 16",
        ),
        (
            ["--backend", "torch", "--quantization", "int8"],
            "quantization int8 needs the native backend, but backend is",
        ),
        (["--trace", "nowhere/a.json"], "trace: cannot write nowhere/a.json: No such file or directory"),
        (["--trace", "."], r"trace: cannot write \.: Is a directory"),
        (["--max-num-batched-tokens", "8"], r"max_num_batched_tokens \(8\) must be at least max_num_seqs \(64\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_a_start_can_tell(tmp_path: Path, tiny_folder: Path, args: list[str], said: str) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise ImportError('that of the working directory')")
    assert re.search(said, refusal(tmp_path, "--model", str(tiny_folder), *args))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", pytest.param("tokenizer.json", marks=pytest.mark.long)]
)
def test_a_missing_file(tmp_path: Path, copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert name in refusal(tmp_path, "--model", str(copy))


def truncated(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    save_file(tensors, copy / "model.safetensors")


def change(name: str, **fields: Any) -> Callable[[Path], None]:
    def apply(copy: Path) -> None:
        path = copy / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, ["model.safetensors", "truncated"]),
        pytest.param(wrong_shape, ["model.safetensors", "model.norm.weight", "[64]", "[63]"], marks=pytest.mark.long),
        (change("config.json", model_type="mamba"), ["config.json", "model_type", "mamba"]),
        pytest.param(
            change("config.json", num_hidden_layers=3),
            ["model.safetensors", "model.layers.2."],
            marks=pytest.mark.long,
        ),
        (change("tokenizer.json", model={"type": "other"}), ["tokenizer.json", "not a tokenizer"]),
        (change("tokenizer_config.json", chat_template="{% if %}"), ["chat template"]),
    ],
    ids=["truncated", "wrong shape", "family", "layers", "tokenizer", "template"],
)
def test_a_damaged_checkpoint(tmp_path: Path, copy: Path, damage: Callable[[Path], None], said: list[str]) -> None:
    damage(copy)
    line = refusal(tmp_path, "--model", str(copy))
    assert all(part in line for part in said), line


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(tmp_path, "--port", str(port))
    assert f"port {port}: Address already in use" in line


def test_settings_are_read_in_their_order(tmp_path: Path) -> None:
    """Each source has a wrong value that no stronger source replaces; the message shows them all."""
    (tmp_path / "shoal.toml").write_text("[server]\nport = 70001\nprot = 1\n[cache]\nblock_size = 0\nnum_blocks = 0\n")
    environment = {"SHOAL_SERVER__PORT": "70002", "SHOAL_CACHE__BLOCK_SIZE": "-1"}
    code, printed = run_shoal(tmp_path, "serve", "--port", "70003", **environment)
    assert code == 2
    assert sorted(line.removeprefix("shoal serve: ") for line in printed.splitlines()) == [
        "cache.block_size must be at least 1, not -1",
        "cache.num_blocks must be at least 1, not 0",
        "server.port must be at most 65535, not 70003",
        "server.prot: unknown setting; did you mean port?",
    ]


def test_help_names_every_setting(tmp_path: Path) -> None:
    code, printed = run_shoal(tmp_path, "serve", "--help")
    printed = " ".join(printed.split())
    assert code == 0
    options = {f"--{name.replace('_', '-')}" for settings in declared().values() for name in settings}
    for option in options - {"--method"} | {"--model", "--config", "--speculation"}:
        assert f"{option} " in printed
    for settings in declared().values():
        for one in settings.values():
            assert " ".join(one.field.metadata["help"].split()) in printed


def test_help_lists_the_commands(tmp_path: Path) -> None:
    code, printed = run_shoal(tmp_path, "--help")
    printed = " ".join(printed.split())
    assert code == 0
    assert all(f" {command} " in printed for command in ("serve", "chat", "complete"))
