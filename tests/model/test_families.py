"""Every family of the table against transformers, and what its rows refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.config import load_config
from shoal.model.checkpoint.families import FAMILIES
from shoal.model.checkpoint.families.refused import REFUSED
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.step.batch import Backend
from shoal.scheduler.errors import CheckpointError
from tests.model.batches import Paged
from tests.model.families import CONFIGURATIONS, make, write
from tests.model.oracles import random_steps, run_chunks
from tests.model.variations import VARIATIONS

POOL = {"num_blocks": 64, "block_size": 16}
BACKENDS: dict[str, Callable[..., Backend]] = {"torch": TorchBackend, "native": partial(NativeBackend, num_threads=1)}
NUM_TOKENS = 64
# Transformers' own mask of XGLM overflows in float64.
IN_FLOAT32 = "xglm"
# Transformers' plain attention adds Falcon's ALiBi twice.
WITH_SDPA = "falcon"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the checkpoint of a configuration, which is written once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write(name, path)

    return folder


def transformers_logits(name: str, folder: Path) -> Callable[[list[int]], np.ndarray]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if name.startswith(IN_FLOAT32) else torch.float64,
        attn_implementation="sdpa" if name.startswith(WITH_SDPA) else "eager",
        experts_implementation="eager",
    )

    @torch.no_grad()
    def logits(tokens: list[int]) -> np.ndarray:
        return model(torch.tensor([tokens])).logits[0].float().numpy()

    return logits


def greedy(backend: Backend, pages: Paged, texts: dict[str, list[int]], count: int) -> dict[str, np.ndarray]:
    """Append `count` tokens to all texts, the likeliest one each time, in one batch; give the logits of those steps."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in texts}
    for _ in range(count):
        logits = backend.forward(pages.batch([(name, text[-1:], len(text) - 1) for name, text in texts.items()]))
        for (name, text), row in zip(texts.items(), logits, strict=True):
            rows[name].append(row)
            text.append(int(row.argmax()))
    return {name: np.stack(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(
    "name", [*CONFIGURATIONS, *(pytest.param(name, marks=pytest.mark.long) for name in VARIATIONS)]
)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, backend_name: str, folders: Callable[[str], Path]
) -> None:
    """Through chunks of two prompts in mixed steps, and then a batch of both."""
    if backend_name == "native" and not supported_isas():
        pytest.skip("the native backend is not built")
    record = load_checkpoint(folders(name))
    backend = BACKENDS[backend_name](record, **POOL)
    pages = Paged(**POOL, num_groups=len(record.config.cache_groups))
    rng = np.random.default_rng(1)
    texts = {str(length): rng.integers(3, 1003, length).tolist() for length in (70, 11)}
    prompts = {text: tokens[:-1] for text, tokens in texts.items()}
    logits = run_chunks(backend, pages, prompts, random_steps(1, prompts))
    further = greedy(backend, pages, texts, NUM_TOKENS)
    expected_logits = transformers_logits(name, folders(name))
    for text, tokens in texts.items():
        expected = expected_logits(tokens[:-1])
        scale = np.abs(expected).max()
        found = np.concatenate((logits[text], further[text]))
        np.testing.assert_allclose(found, expected, atol=1e-4 * scale, rtol=0)
        assert tokens[-NUM_TOKENS:] == expected[-NUM_TOKENS:].argmax(axis=1).tolist()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_config_as_transformers_4_writes_it_means_the_same(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((folders(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(as_transformers_4(config)))
    assert load_config(tmp_path) == load_config(folders(name))


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.pop("rope_parameters", None)
    config["torch_dtype"] = config.pop("dtype")
    if not rope:
        return config
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[key] = rope.pop(key)
    kind = rope.pop("rope_type")
    return config | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}}


def test_every_family_has_a_configuration() -> None:
    assert {model_type for model_type, _ in CONFIGURATIONS.values()} == set(FAMILIES)
    assert not REFUSED.keys() & FAMILIES.keys() and not VARIATIONS.keys() & CONFIGURATIONS.keys()


@pytest.mark.parametrize(
    "name", ["mixtral", "deepseek_v3", "granitemoeshared", "minimax_m2", "ernie4_5_moe", "gpt_neox"]
)
def test_names_within_transformers_are_those_of_files(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """In memory, transformers 5 has all experts in one tensor, and other names."""
    (tmp_path / "config.json").write_text((folders(name) / "config.json").read_text())
    state = {tensor: value.clone() for tensor, value in make(name).state_dict().items()}
    assert state.keys() != load_file(folders(name) / "model.safetensors").keys()
    save_file(state, tmp_path / "model.safetensors")
    assert_same_arrays(tmp_path, folders(name))


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model."), ("llama", "model.")]
)
def test_the_prefix_of_names_may_be_missing(
    name: str, prefix: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((folders(name) / "config.json").read_text())
    tensors = load_file(folders(name) / "model.safetensors")
    assert any(tensor.startswith(prefix) for tensor in tensors)
    save_file({tensor.removeprefix(prefix): value for tensor, value in tensors.items()}, tmp_path / "model.safetensors")
    assert_same_arrays(tmp_path, folders(name))


def test_masks_are_not_weights(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders("gpt2") / "config.json").read_text())
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.1.attn.masked_bias": torch.ones(1)}
    save_file(load_file(folders("gpt2") / "model.safetensors") | masks, tmp_path / "model.safetensors")
    assert_same_arrays(tmp_path, folders("gpt2"))


def test_layers_that_predict_further_tokens_are_left_out(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders("deepseek_v3") / "config.json").read_text())
    further = {"model.layers.2.eh_proj.weight": torch.ones(8, 8)}
    save_file(load_file(folders("deepseek_v3") / "model.safetensors") | further, tmp_path / "model.safetensors")
    assert_same_arrays(tmp_path, folders("deepseek_v3"))


def test_arithmetic_on_bfloat16_goes_through_float32(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders("gemma") / "config.json").read_text())
    tensors = {name: value.bfloat16() for name, value in load_file(folders("gemma") / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    norm = load_checkpoint(tmp_path).norm
    assert norm is not None and norm.gain is not None
    np.testing.assert_array_equal(norm.gain, tensors["model.norm.weight"].float().numpy() + 1)


def assert_same_arrays(one: Path, other: Path) -> None:
    pairs = zip(load_checkpoint(one).tensors(), load_checkpoint(other).tensors(), strict=True)
    for (*place, array), (*other_place, other_array) in pairs:
        assert place == other_place
        np.testing.assert_array_equal(array, other_array)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(folders: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Gives a copy of a configuration's checkpoint with keys of its `config.json` changed; None takes a key away."""

    def edit(name: str, changes: dict[str, Any]) -> Path:
        config = json.loads((folders(name) / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if config[key] != "gone"}))
        save_file(load_file(folders(name) / "model.safetensors"), tmp_path / "model.safetensors")
        return tmp_path

    yield edit


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_refuses_keys_that_the_row_does_not_know(name: str, edited: Callable[..., Path]) -> None:
    load_config(edited(name, {"attention_temperature": None}))
    with pytest.raises(CheckpointError, match=r"config\.json: attention_temperature: unknown for the family"):
        load_config(edited(name, {"attention_temperature": 0.5}))


@pytest.mark.parametrize("model_type", REFUSED)
def test_refuses_families_with_the_reason(model_type: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: model_type: '{model_type}' is not supported: .{{20}}"):
        load_config(edited("llama", {"model_type": model_type}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "t5"}, "model_type: 't5' is not supported; docs/models.md lists"),
        ("llama", {"model_type": "gone"}, "model_type: expected the name of a family, found None"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types: only full_attention is supported"),
        ("llama", {"sliding_window": 8}, "sliding_window: unknown for the family llama"),
        ("llama", {"qk_layernorm": True}, "qk_layernorm: unknown for the family llama"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: quantized checkpoints are not supported"),
        ("llama", {"hidden_act": "mish"}, "hidden_act: 'mish' is not supported; supported: silu, "),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional' is not supp"),
        ("llama", {"rope_parameters": {"rope_type": "default", "beta": 1}}, r"rope_parameters\.beta: unknown for rope"),
        ("qwen2-window", {"layer_types": ["full_attention"]}, "layer_types: expected a list of 4 kinds"),
        ("qwen2-window", {"layer_types": ["linear_attention"] * 4}, "layer_types: 'linear_attention' is not supported"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv: 8.0 is not supported; supported: null"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: unknown for the family"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: true is not supported; supported: false",
        ),
        ("gpt2", {"n_embd": "gone"}, "n_embd: missing"),
        ("gpt2", {"n_embd": 57}, "n_embd: 57 is not a multiple of n_head 7"),
        ("gpt2", {"hidden_size": 64}, "(hidden_size|n_embd): .* differs from"),
        ("gpt_neo", {"attention_types": [[["random"], 2]], "attention_layers": "gone"}, "attention_types: expected 2"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine: false is not supported"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm: true"),
        ("mpt", {"attn_config": {"alibi": False}}, r"attn_config\.alibi: false is not supported; supported: true"),
        ("mpt", {"attn_config": {"alibi": True, "rope": True}}, r"attn_config\.rope: unknown for the family mpt"),
        (
            "phi3-longrope",
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}},
            "long_factor: expected",
        ),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method: "noaux_tc" is not supported; supported: "greedy", '),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: true is not supported"),
        ("deepseek_v3", {"n_group": 3}, "n_group: 16 experts are not a multiple of 3 groups"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group: 5 exceeds n_group 4"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 exceeds 2 groups of 4 experts"),
        ("mixtral", {"num_experts_per_tok": 4}, "num_experts_per_tok: 4 exceeds num_local_experts 3"),
        ("llama4", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers: expected 4 times 0 or 1"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit: 5.0 is not supported; supported: 7.0"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling: expected a number above 0"),
        ("cohere2", {"sliding_window_pattern": 0.5}, "sliding_window_pattern: expected an integer of at least 1"),
    ],
)
def test_refuses_by_key(name: str, changes: dict[str, Any], message: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}") as error:
        load_config(edited(name, changes))
    assert len(error.value.message) < 300 + len(str(edited(name, {})))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
        ("stablelm-2-12b", "model.layers.1.self_attn.q_layernorm.norms.6.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek_v2", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("gpt_oss", "model.layers.3.self_attn.sinks"),
        ("opt-350m", "model.decoder.project_out.weight"),
        ("bloom", "transformer.word_embeddings_layernorm.bias"),
    ],
)
def test_refuses_tensors_by_name(name: str, tensor: str, edited: Callable[..., Path]) -> None:
    folder = edited(name, {})
    path = folder / "model.safetensors"
    tensors = load_file(path)
    wrong = torch.zeros([size + 1 for size in tensors[tensor].shape])
    rest = {key: value for key, value in tensors.items() if key != tensor}
    for changed, message in (
        (rest, f"tensor {tensor}: missing; expected shape"),
        (rest | {tensor: wrong}, f"tensor {tensor}: expected shape"),
        (tensors | {f"{tensor}_2": wrong}, f"tensor {tensor}_2: unknown to the architecture"),
    ):
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
            load_checkpoint(folder)
