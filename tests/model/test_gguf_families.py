"""GGUF files of every architecture against the checkpoints that they were converted from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint

from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.config import load_config
from shoal.model.checkpoint.gguf_architectures import ARCHITECTURES
from shoal.model.checkpoint.gguf_checkpoint import GgufCheckpoint
from shoal.model.checkpoint.gguf_file import ArrayValue
from shoal.model.checkpoint.gguf_weights import find_format
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.checkpoint.pre_tokenizers import CUTS
from shoal.model.record import Attention, ModelRecord
from shoal.scheduler.errors import CheckpointError
from tests.examples import examples
from tests.gguf_converter import convert
from tests.model import families
from tests.model.batches import Paged
from tests.model.oracles import run_chunks

YARN = families.YARN
MAGNITUDE = {"mscale": 0.7, "mscale_all_dim": 0.7}
# By architecture: the configurations of `families.py`, and what to change in them, because GGUF files do not hold it
# and llama.cpp takes it as given.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "llama", {}),
    ("llama", "llama-biases", {}),
    ("llama", "llama-yarn", {}),
    ("llama", "mixtral", {}),
    ("mistral3", "ministral3", {"rope_parameters": YARN | MAGNITUDE | {"llama_4_scaling_beta": 0.3}}),
    ("mistral3", "mistral", {"sliding_window": None}),
    (
        "llama4",
        "llama4",
        {"attention_chunk_size": 8192, "floor_scale": 8192, "no_rope_layers": None, "max_position_embeddings": 9000},
    ),
    ("exaone", "llama", {}),
    ("internlm2", "llama", {}),
    ("xverse", "llama", {}),
    ("qwen2", "qwen2", {}),
    ("qwen2moe", "qwen2_moe", {"decoder_sparse_step": 1}),
    ("qwen3", "qwen3", {}),
    ("qwen3moe", "qwen3_moe", {"mlp_only_layers": []}),
    ("gemma", "gemma", {}),
    ("gemma2", "gemma2", {"query_pre_attn_scalar": 12}),
    ("gemma3", "gemma3", {"query_pre_attn_scalar": 12, "num_hidden_layers": 6, "layer_types": None}),
    ("phi2", "phi", {"intermediate_size": 224}),
    ("phi3", "phi3", {}),
    ("phi3", "phi3-longrope", {}),
    ("gpt2", "gpt2", {}),
    ("gptj", "gptj", {}),
    ("gptneox", "gpt_neox", {}),
    ("gptneox", "gpt_neox-sequential", {}),
    ("falcon", "falcon-7b", {}),
    ("falcon", "falcon-40b", {}),
    ("bloom", "bloom", {}),
    ("mpt", "mpt", {}),
    ("starcoder", "gpt_bigcode", {}),
    ("starcoder2", "starcoder2", {"sliding_window": None}),
    ("stablelm", "stablelm", {}),
    ("stablelm", "stablelm-2-12b", {}),
    ("olmo", "olmo", {}),
    ("olmo2", "olmo2", {}),
    ("olmo2", "olmo3", {}),
    ("olmoe", "olmoe", {}),
    ("granite", "granite", {}),
    ("granitemoe", "granitemoe", {}),
    ("granitemoe", "granitemoeshared", {}),
    ("deepseek2", "deepseek_v2-lite", {}),
    ("deepseek2", "deepseek_v2", {}),
    ("deepseek2", "deepseek_v2-yarn", {"rope_parameters": YARN | MAGNITUDE}),
    ("deepseek2", "deepseek_v3", {}),
    ("deepseek2", "deepseek_v3-yarn", {"rope_parameters": YARN | MAGNITUDE}),
    ("command-r", "cohere", {}),
    ("cohere2", "cohere2", {}),
    ("chatglm", "glm", {}),
    ("glm4", "glm4", {}),
    ("glm4moe", "glm4_moe", {}),
    ("gpt-oss", "gpt_oss", {}),
    ("exaone4", "exaone4", {}),
    ("smollm3", "smollm3", {"no_rope_layer_interval": 4}),
    ("arcee", "arcee", {}),
    ("ernie4_5", "ernie4_5", {}),
    ("ernie4_5-moe", "ernie4_5_moe", {}),
    ("hunyuan-dense", "hunyuan_v1_dense", {}),
    ("dots1", "dots1", {}),
    ("nemotron", "nemotron", {}),
    ("seed_oss", "seed_oss", {}),
    ("minimax-m2", "minimax_m2", {}),
]


def test_every_architecture_has_a_case() -> None:
    assert {architecture for architecture, *_ in CASES} == set(ARCHITECTURES)
    assert len(ARCHITECTURES) == 46


def test_the_documentation_lists_all() -> None:
    """Architectures, cuts of tokenizers and quantisations."""
    text = (Path(__file__).parents[2] / "docs/gguf.md").read_text()
    types = [kind.name for kind in gguf.GGMLQuantizationType if find_format(kind)]
    missing = [name for name in (*ARCHITECTURES, *CUTS, *types) if f"`{name}`" not in text]
    assert not missing and len(types) == 26


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A tiny checkpoint of a configuration with changes."""

    def write(name: str, **changes: Any) -> Path:
        model_type, own = families.CONFIGURATIONS[name]
        monkeypatch.setitem(families.CONFIGURATIONS, name, (model_type, own | changes))
        return families.write(name, tmp_path / "folder")

    return write


@pytest.mark.parametrize(("architecture", "name", "changes"), CASES, ids=[f"{a}-{name}" for a, name, _ in CASES])
def test_a_converted_checkpoint_is_the_same_model(
    architecture: str, name: str, changes: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(name, **changes)
    ours = load_checkpoint(convert(folder, tmp_path / "model.gguf", architecture))
    theirs = load_checkpoint(folder)
    assert_same_config(ours, theirs)
    found, expected = (dict(named_arrays(record)) for record in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array, err_msg=str(key))


# Transformers has another name for the architecture of some, and does not bring all tensors of others back.
_UNREAD = ("mixtral", "falcon-40b", "stablelm-2-12b", "gpt_oss")
READ = [case for case in CASES if case[0] in GGUF_SUPPORTED_ARCHITECTURES and case[1] not in _UNREAD]


@pytest.mark.parametrize(("architecture", "name", "changes"), READ, ids=[name for _, name, _ in READ])
def test_converted_checkpoints_are_what_transformers_reads(
    architecture: str, name: str, changes: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """So that the tests' converter is not taken at its word."""
    path = convert(checkpoint(name, **changes), tmp_path / "model.gguf", architecture)
    model = families.make(name)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert read.keys() | tied == model.state_dict().keys()
    for key, tensor in read.items():
        expected = model.state_dict()[key].numpy()
        np.testing.assert_allclose(tensor.numpy().reshape(expected.shape), expected, atol=1e-6, rtol=0, err_msg=key)


def test_logits_where_the_order_of_elements_differs(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """SmolLM3's layers without RoPE: the converter brings the elements of their heads into pairs as well."""
    folder = checkpoint("smollm3", no_rope_layer_interval=4)
    tokens = {"a": np.random.default_rng(0).integers(3, 1003, 40).tolist()}
    found, expected = (
        run_chunks(TorchBackend(load_checkpoint(path), num_blocks=8, block_size=8), Paged(8, 8), tokens, [{"a": 40}])
        for path in (convert(folder, tmp_path / "model.gguf", "smollm3"), folder)
    )
    np.testing.assert_allclose(found["a"], expected["a"], atol=1e-5 * np.abs(expected["a"]).max(), rtol=0)


def test_which_layers_have_a_window(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """By a flag for each layer, by a number, or as llama.cpp takes it."""
    folder = checkpoint("gemma3", query_pre_attn_scalar=12, num_hidden_layers=6, layer_types=None)

    def windows(pattern: Any) -> list[bool]:
        changes = {"attention__sliding_window_pattern": pattern}
        path = convert(folder, tmp_path / "model.gguf", "gemma3", **changes)
        return [layer.window > 0 for layer in load_config(path).layers]

    flags = [False, True, True, False, False, True]
    assert windows(flags) == flags
    assert windows(3) == [True, True, False] * 2
    assert windows(None) == [True] * 5 + [False]
    with pytest.raises(CheckpointError, match=r"gemma3\.attention\.sliding_window_pattern: 2 flags for 6 layers"):
        windows([True, False])


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
@pytest.mark.parametrize(
    ("architecture", "name"),
    [("deepseek2", "deepseek_v3"), ("gpt-oss", "gpt_oss"), ("falcon", "falcon-40b"), ("stablelm", "stablelm-2-12b")],
)
def test_other_formats_of_numbers(
    architecture: str, name: str, kind: Type, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(name)
    ours = load_checkpoint(convert(folder, tmp_path / "model.gguf", architecture, matrices=kind))
    assert ours.config.dtype == {Type.F16: "float16", Type.BF16: "bfloat16"}[kind]
    expected = dict(named_arrays(load_checkpoint(folder)))
    for key, array in named_arrays(ours):
        rounded = gguf.quantize(expected[key], kind) if array.dtype != np.float32 else expected[key]
        assert array.tobytes() == np.ascontiguousarray(rounded).tobytes(), key
    assert {array.dtype.str for _, array in named_arrays(ours)} == {"<f4", {Type.F16: "<f2", Type.BF16: "<u2"}[kind]}


def assert_same_config(ours: ModelRecord, theirs: ModelRecord) -> None:
    """But for the name, and what is rounded to float32."""
    for field, expected in asdict(theirs.config).items():
        if field not in ("architecture", "family"):
            assert_near(asdict(ours.config)[field], expected, field)


def assert_near(found: Any, expected: Any, field: str) -> None:
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert_near(found[name], value, f"{field}.{name}")
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), field
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other, field)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6), field
    else:
        assert found == expected, field


def named_arrays(record: ModelRecord) -> Iterator[tuple[Any, Any]]:
    """All arrays by name.  Where nothing turns queries and keys, the order of a head's elements is free: there their
    products count."""
    for name, layer, expert, array in record.tensors():
        free = name in ("q_proj", "k_proj") and record.config.layers[layer].rope is None and not record.config.latent
        if not free:
            yield (name, layer, expert), array
    for index, part in enumerate(record.layers):
        if record.config.layers[index].rope is None and isinstance(part.attention, Attention):
            yield ("scores", index, 0), scores(record, part.attention)


def scores(record: ModelRecord, attention: Attention) -> Any:
    """What queries and keys make of two hidden states, for each head, rounded as the order of sums may differ."""
    config = record.config
    q = attention.q_proj.weight.reshape(config.num_kv_heads, -1, config.head_dim, config.hidden_size)
    k = attention.k_proj.weight.reshape(config.num_kv_heads, config.head_dim, config.hidden_size)
    return np.einsum("ghdi,gdj->ghij", q.astype(np.float64), k.astype(np.float64)).round(6)


# Where keys have the most to say.
_TALKATIVE = ("ministral3", "llama4", "gemma3", "falcon-40b", "deepseek_v2-yarn", "gpt_oss")
TALKATIVE = [case for case in CASES if case[1] in _TALKATIVE]
values = st.integers(-2, 2**40) | st.floats() | st.text(max_size=3) | st.booleans() | st.just(ArrayValue(9, 3, 0))


@pytest.mark.parametrize(("architecture", "name", "changes"), TALKATIVE, ids=[name for _, name, _ in TALKATIVE])
def test_any_value_of_any_key_is_read_or_refused_by_name(
    architecture: str, name: str, changes: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    opened = GgufCheckpoint(convert(checkpoint(name, **changes), tmp_path / "model.gguf", architecture))
    file = opened._file
    keys = [key for key in file.metadata if key.startswith(architecture)]
    unknown = f"{architecture}.attention.none_such"

    @settings(max_examples=examples(150))
    @given(st.sampled_from([*keys, unknown]), values | st.none())
    def check(key: str, value: Any) -> None:
        metadata = {**file.metadata, key: value}
        opened._file = replace(file, metadata={name: held for name, held in metadata.items() if held is not None})
        try:
            load_config(opened)
        except CheckpointError as error:
            assert architecture in error.message and len(error.message) < 400
        else:
            assert key != unknown or value is None

    check()
