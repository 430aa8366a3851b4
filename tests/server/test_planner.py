"""`shoal plan`: its tables, its JSON, its picture, and what it refuses."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.cli import main
from shoal.model.checkpoint.load import load_checkpoint
from shoal.server.planner import machines, measure, subject
from shoal.server.planner.costs import Split, Step
from shoal.server.wire.engine import MachineName
from tests.e2e.checkpoints import LLAMA, random_checkpoint
from tests.gguf_writer import write_gguf
from tests.model.families import write


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_TURNS", 1)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, args)])


def told(*args: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--json").stdout)
    return found


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama2-7b.json"
    path.write_text(json.dumps(LLAMA))
    return path


def test_llama_2_7b_on_an_a100(llama: Path) -> None:
    """6.74 billion parameters, half a MiB of cache a token, and a decode step that reads all weights."""
    plan = told(llama, "--machine", "a100")
    facts = plan["facts"]
    assert facts["num_parameters"] == 6_738_415_616
    assert facts["num_weights_of_one_token"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    kinds = {row["attention"]: row["bytes"] for row in plan["cache"]}
    assert kinds["this model"] == kinds["MHA"] == 2**19
    assert kinds["MQA"] == 2**19 / 32
    parts = {row["part"]: row for row in plan["parts"]}
    assert parts["all"]["flops"] == pytest.approx(sum(row["flops"] for name, row in parts.items() if name != "all"))
    (alone,) = (row for row in plan["steps"] if (row["step"], row["sequences"], row["length"]) == ("decode", 1, 4096))
    read = 2 * (6_738_415_616 - 32000 * 4096) + 4096 * 2**19
    assert (alone["bytes"], alone["limit"]) == (read, "reading")
    assert alone["seconds"] == pytest.approx(read / 2039e9)
    assert plan["steps"][0]["limit"] == "computing"
    fits = {row["length"]: row["requests"] for row in plan["fit"]}
    assert fits[4096] == (80_000_000_000 - facts["weights_bytes"]) // 2**31


def test_the_same_from_a_folder_and_a_gguf_file(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "plain")
    write_gguf(tmp_path / "model.gguf", folder)
    plans = [told(path, "--machine", "l4") for path in (folder, folder / "config.json", tmp_path / "model.gguf")]
    assert plans[0]["parts"] == plans[1]["parts"] == plans[2]["parts"]
    assert plans[0]["facts"]["num_parameters"] == load_checkpoint(folder).num_parameters


def test_the_blocks_of_a_gguf_file_are_read_as_they_are(tmp_path: Path) -> None:
    """34 bytes for 32 weights; vectors are float32."""
    folder, shape = tmp_path / "plain", {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)
    file = write_gguf(tmp_path / "model.gguf", folder, matrices=GGMLQuantizationType.Q8_0)
    stored = sum(array.nbytes for *_, array in load_checkpoint(file).tensors())
    assert told(file, "--machine", "l4")["facts"]["weights_bytes"] == pytest.approx(stored)
    assert stored < 0.3 * told(folder, "--machine", "l4")["facts"]["weights_bytes"]


def test_windows_keep_what_they_show(tmp_path: Path) -> None:
    """Three of four layers see 12 positions."""
    (long,) = (row for row in told(write("olmo3", tmp_path), "--context", 512)["fit"] if row["length"] == 512)
    assert long["cache_bytes"] == 64 * (512 + 3 * 12)


def test_splits(llama: Path) -> None:
    usual = [row["ranks"] for row in told(llama, "--machine", "h100")["splits"]]
    assert usual == ["tp 2", "tp 4", "tp 8", "pp 2", "pp 4", "pp 8"]
    asked = told(llama, "--machine", "h100", "--batch", 8, "--tp", 4, "--pp", 2)["splits"]
    assert [row["ranks"] for row in asked] == ["tp 4", "pp 2", "tp 4, pp 2"]
    tensor, pipeline, both = asked
    assert tensor["sent_by_each_bytes"] == 64 * 2 * 3 / 4 * 8 * 4096 * 2
    # In each layer two of the hidden states, of attention and of the block; then the embedding, and the logits.
    columns = 32 * (3 * 4096 + 11008) + 2 * 4096 + 32000 / 4
    assert tensor["for_the_same_bits_bytes"] == 3 / 4 * columns * 8 * 2
    assert tensor["weights_of_each_bytes"] == 2 * both["weights_of_each_bytes"]
    assert 1 < tensor["times_as_fast"] < 4
    assert pipeline["times_as_fast"] <= 2


def test_what_does_not_fit_is_said(llama: Path) -> None:
    big = json.loads(llama.read_text()) | {"num_hidden_layers": 320, "torch_dtype": "bfloat16"}
    llama.write_text(json.dumps(big))
    plan = told(llama, "--machine", "rtx4090")
    assert {row["requests"] for row in plan["fit"]} == {0}
    assert plan["pays"]["one alone"].startswith("not at all: the weights take 5.")


def test_batching_pays_as_far_as_it_says(llama: Path) -> None:
    """From there on twice the sequences give less than 1.1 times the tokens/s."""
    costs = subject.place(subject.read_shapes(str(llama)), "a100", context=512, asked=Split()).costs
    words = told(llama, "--machine", "a100", "--context", 512)["pays"]["batching"]
    (last,) = map(int, re.findall(r"up to (\d+) sequences", words))
    half, whole, twice = (
        n / costs.seconds(Step.decode(n, 512), machines.MACHINES["a100"]) for n in (last // 2, last, 2 * last)
    )
    assert twice < 1.1 * whole
    assert whole >= 1.1 * half


def test_tables_and_a_picture(llama: Path, tmp_path: Path) -> None:
    shown = run(llama, "--machine", "h200", "--picture", tmp_path / "roofline.svg")
    assert shown.exit_code == 0
    for title in ("Parts", "Layers", "KV cache", "Roofline", "Speculation", "Splitting", "Where it pays", "Training"):
        assert f"\n{title}" in shown.stdout
    root = ET.parse(tmp_path / "roofline.svg").getroot()
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 5
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(circle.get("cx", 0)) < 800 and 0 < float(circle.get("cy", 0)) < 480


def test_measured_beside_the_bound(tmp_path: Path) -> None:
    plan = told(random_checkpoint(tmp_path), "--measure", "--context", 32, "--batch", 2)
    kinds = [(row["step"], row["sequences"], row["length"]) for row in plan["measured"]]
    assert kinds == [("prefill", 1, 32), ("decode", 1, 32), ("decode", 2, 32)]
    for row in plan["measured"]:
        assert row["of_the_bound"] == pytest.approx(row["bound_seconds"] / row["measured_seconds"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"num_hidden_layers": -3}, "num_hidden_layers: expected an integer of at least 1, found -3"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 exceeds 10000"),
        ({"vocab_size": 10**30}, "vocab_size: expected an integer of at most 67108864, found 1000000"),
        ({"hidden_size": 2**40, "head_dim": 8}, "hidden_size: expected an integer of at most 16777216, found 1"),
        ({"intermediate_size": 10**400}, "intermediate_size: expected an integer of at most 16777216, found 1000"),
        ({"hidden_size": "big"}, "hidden_size: expected an integer of at least 1, found 'big'"),
        (
            {"model_type": "mixtral", "num_local_experts": 2**14, "num_experts_per_tok": 1, "num_hidden_layers": 5},
            "num_experts of all layers: expected an integer of at most 65536, found 81920",
        ),
        ({"num_key_value_heads": 5}, "num_attention_heads: 32 is not a multiple of num_key_value_heads 5"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: expected an integer of at least 1, found 0"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, Any], words: str, llama: Path) -> None:
    llama.write_text(json.dumps(LLAMA | changes))
    failed = run(llama)
    assert failed.exit_code == 2
    assert failed.stderr.startswith(f"shoal plan: {llama}: {words}")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--context", "4097"], "context 4097: the model can have at most 4096 tokens"),
        (["--tp", "33"], "tp 33: the model can be split over at most 32 in this way"),
        (["--ep", "2"], "ep 2: the model can be split over at most 1 in this way"),
        (["--machine", "a100", "--measure"], "--measure: only this machine can be measured"),
        (["--measure"], "is neither a checkpoint folder, nor a .gguf file"),
        (["--picture", "nowhere/a.svg"], "nowhere/a.svg: No such file or directory"),
        (["--batch", "0"], "0 is not in the range"),
        (["--machine", "abacus"], "'abacus' is not one of"),
    ],
)
def test_options_that_cannot_be_are_named(args: list[str], words: str, llama: Path) -> None:
    failed = run(llama, *args)
    assert failed.exit_code == 2
    assert words in " ".join(failed.stderr.split())


def test_every_machine_can_be_named() -> None:
    assert ("auto", *machines.MACHINES) == get_args(MachineName)
