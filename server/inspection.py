"""What a model is, in tables: its architecture, its parts, what it takes of memory, and what will serve it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from shoal.model.architecture import LatentConfig, MixtureConfig, ModelConfig, RopeConfig, Temperature
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.format import open_checkpoint
from shoal.model.checkpoint.load import outline_checkpoint
from shoal.model.numbers import Array, count_numbers
from shoal.model.record import ModelRecord
from shoal.scheduler.errors import ShoalError
from shoal.server.engine.backends import plan_backend
from shoal.server.settings import Settings
from shoal.terminal import in_words

# What every family has, and what says nothing about how the model computes.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_LLAMA_LAYER = {"rope": ..., "window": 0, "chunk": 0, "temperature": None, "mixture": None}
_LLAMA_NORMS = {"input_norm", "feed_forward_norm", "norm"}
_LAYER_NORMS = ("input_norm", "attention_output_norm", "feed_forward_norm", "feed_forward_output_norm")
_ARRAYS_BEYOND_LLAMA = {"positions", "embedding_norm", "q_norm", "k_norm", "sinks", "correction", "shared_gate"}
# The part of the model that an array belongs to, by the name of its field; all others are of attention.
_PARTS = {
    "embedding": "embedding",
    "head": "head",
    "positions": "positions",
    "router": "router",
    "correction": "router",
    "gate_proj": "feed-forward",
    "up_proj": "feed-forward",
    "down_proj": "feed-forward",
    "shared_gate": "shared experts",
}


@dataclass(frozen=True)
class Part:
    """A part of the model over all layers.

    Attributes:
        num_active: parameters that one token is multiplied with.
    """

    name: str
    num_parameters: int
    num_active: int


@dataclass(frozen=True)
class Inspection:
    """All that `shoal inspect` says of a model.

    Attributes:
        sizes: fields that every model has.
        differences: fields that differ from Llama's, with their values in words.
        held: what the file holds: by number format, the number of tensors and their bytes.
        cache: KV cache of a token: the layers of each kind, and the bytes that they take.
        cache_as: elements of a token's KV cache over all layers, if attention were of another kind.
        num_weight_bytes: of the weights as they will be kept; None if nothing can serve them.
        served_by: the backend and its precision; None if nothing can.
        obstacle: why nothing can serve it, or why torch does though nobody asked for it.
    """

    model: str
    path: str
    family: str
    architecture: str
    precision: str
    sizes: dict[str, Any]
    differences: dict[str, str]
    parts: tuple[Part, ...]
    held: dict[str, tuple[int, int]]
    cache: dict[str, int]
    cache_as: dict[str, int]
    num_weight_bytes: int | None
    served_by: str | None
    obstacle: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> Iterator[tuple[str, Sequence[Mapping[str, object]]]]:
        """Titles and rows for people."""
        about = {"family": self.family, "architecture": self.architecture, "precision": self.precision, **self.sizes}
        yield self.model, [{"field": name, "value": str(value)} for name, value in about.items()]
        if self.differences:
            yield "Not as in Llama", [{"field": name, "value": value} for name, value in self.differences.items()]
        total = Part("all", sum(p.num_parameters for p in self.parts), sum(p.num_active for p in self.parts))
        yield (
            "Parameters",
            [
                {
                    "part": part.name,
                    "parameters": in_words(part.num_parameters),
                    "for one token": in_words(part.num_active),
                    "share": f"{100 * part.num_parameters / total.num_parameters:.1f} %",
                }
                for part in (*self.parts, total)
            ],
        )
        held = [{"in the file as": kind, "tensors": n, "size": in_words(b, "B")} for kind, (n, b) in self.held.items()]
        yield self.path, held
        yield (
            "KV cache of a token",
            [{"layers": kind, "size": in_words(size, "B")} for kind, size in self.cache.items()],
        )
        own = sum(self.cache.values())
        bytes_each = own / self.cache_as["this model"]
        yield (
            "The same width with other attention",
            [
                {
                    "attention": kind,
                    "size": in_words(int(n * bytes_each), "B"),
                    "of this": f"{n * bytes_each / own:.2f}",
                }
                for kind, n in self.cache_as.items()
            ],
        )
        served = [{"what": "served by", "": self.served_by or "nothing"}]
        if self.num_weight_bytes is not None:
            served.append({"what": "weights in memory", "": str(in_words(self.num_weight_bytes, "B"))})
        if self.obstacle:
            served.append({"what": "because", "": self.obstacle})
        yield "Serving", served


def inspect_model(settings: Settings) -> Inspection:
    """Inspect the model of the settings; of its weights only the headers are read.

    Raises:
        CheckpointError: it cannot be found or loaded.
    """
    opened = open_checkpoint(resolve_checkpoint(settings.model))
    record = outline_checkpoint(opened)
    config = record.config
    served_by, obstacle, cache_dtype, weight_bytes = _serving(settings, record)
    return Inspection(
        model=settings.model,
        path=str(opened.path),
        family=config.family,
        architecture=config.architecture,
        precision=config.dtype,
        sizes={name: getattr(config, name) for name in _SIZES},
        differences=dict(_differences(record)),
        parts=tuple(count_parts(record)),
        held=opened.holds(),
        cache=_cache(config, cache_dtype),
        cache_as=cache_as(config),
        num_weight_bytes=weight_bytes,
        served_by=served_by,
        obstacle=obstacle,
    )


def _serving(settings: Settings, record: ModelRecord) -> tuple[str | None, str | None, str, int | None]:
    """The backend in words, what stands against it, the number format of the cache, and the bytes of the weights."""
    try:
        plan = plan_backend(settings.engine, settings.cache, record.config)
    except ShoalError as error:
        return None, error.message, "float32", None
    return plan.describe(record), plan.warning, plan.kv_cache_dtype, plan.weight_bytes(record)


def _differences(record: ModelRecord) -> Iterator[tuple[str, str]]:
    """The fields whose values are not Llama's, which are the defaults, and the arrays that only one of the two has."""
    config = record.config
    for field in fields(ModelConfig):
        value = getattr(config, field.name)
        if field.default is not MISSING and value != field.default:
            yield field.name, _in_words(value)
    if config.attention_scale != config.head_dim**-0.5:
        yield "attention_scale", f"{config.attention_scale:.4g}"
    for name in ("rope", "window", "chunk", "temperature", "mixture"):
        values = [getattr(layer, name) for layer in config.layers]
        if any(value != _LLAMA_LAYER[name] and not _turns_whole_heads(value, config) for value in values):
            yield name, "; ".join(_by_layers(values))
    names = {name for name, *_ in record.tensors()}
    if biases := sorted(name.removesuffix(".bias") for name in names if name.endswith(".bias")):
        yield "biases", ", ".join(biases)
    norms = {name: getattr(record.layers[0], name) for name in _LAYER_NORMS} | {"norm": record.norm}
    if any(norm and norm.gain is None for norm in norms.values()):
        yield "norms", "without gain"
    has = {name for name, norm in norms.items() if norm} | names & _ARRAYS_BEYOND_LLAMA
    if beyond := sorted(has - _LLAMA_NORMS):
        yield "also has", ", ".join(beyond)
    if missing := sorted(_LLAMA_NORMS - has):
        yield "lacks", ", ".join(missing)


def _turns_whole_heads(value: object, config: ModelConfig) -> bool:
    """Whether this is the rotary embedding of a Llama."""
    return isinstance(value, RopeConfig) and value.dim == config.head_dim and not value.factors


def _by_layers(values: list[Any]) -> Iterator[str]:
    """Each value in words, with the layers that have it, unless that is all."""
    kinds = list(dict.fromkeys(values))
    for kind in kinds:
        layers = [index for index, value in enumerate(values) if value == kind]
        yield _in_words(kind) + (f" in layers {in_ranges(layers)}" if len(kinds) > 1 else "")


def in_ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _in_words(value: object) -> str:
    """A value of a field; of a part of the architecture, the fields that are not at their defaults."""
    if isinstance(value, RopeConfig | Temperature | LatentConfig | MixtureConfig):
        own = [(field, getattr(value, field.name)) for field in fields(value)]
        return ", ".join(f"{field.name} {_in_words(number)}" for field, number in own if number != field.default)
    if isinstance(value, tuple):
        return f"{len(value)} numbers from {min(value):.4g} to {max(value):.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value or "none")


def sort_arrays(record: ModelRecord) -> Iterator[tuple[str, str, int, Array, float]]:
    """Each array of the model: the part that it belongs to, its name, its layer, itself, and the share of it that one
    token is multiplied with."""
    config = record.config
    for name, layer, expert, array in record.tensors():
        mixture = config.layers[layer].mixture
        owner = name.removesuffix(".bias")
        part = _PARTS.get(owner, "norms" if owner.endswith("norm") else "attention")
        share = 0.0 if part in ("embedding", "positions") else 1.0
        if part == "feed-forward" and mixture:
            is_shared = expert == mixture.num_experts
            part = "shared experts" if is_shared else "experts"
            share = 1.0 if is_shared else mixture.num_experts_per_tok / mixture.num_experts
        elif part == "head" and config.tie_word_embeddings:
            part = "embedding and head"
        yield part, name, layer, array, share


def count_parts(record: ModelRecord) -> Iterator[Part]:
    """The parts of the model."""
    totals: Counter[str] = Counter()
    active: Counter[str] = Counter()
    for part, _, _, array, share in sort_arrays(record):
        totals[part] += count_numbers(array)
        active[part] += round(count_numbers(array) * share)
    for part, total in totals.items():
        yield Part(part, total, active[part])


def _cache(config: ModelConfig, dtype: str) -> dict[str, int]:
    """Bytes of a token at the layers of each kind."""
    counts, sizes = Counter[str](), Counter[str]()
    for layout in config.kv_layouts:
        sees = f"a window of {layout.window}" if layout.window else "all positions"
        sees = f"a chunk of {layout.chunk}" if layout.chunk else sees
        counts[sees] += 1
        sizes[sees] += layout.num_bytes(dtype)
    return {f"{counts[sees]} that see {sees}": size for sees, size in sizes.items()}


def cache_as(config: ModelConfig) -> dict[str, int]:
    """Elements of a token's cache, as it is and with other attention of the same width.

    Multi-head attention keeps a key and a value for each head, multi-query attention for one, grouped-query attention
    for each eighth head, and latent attention 4.5 times a head's width for all (DeepSeek-V2, 2024, section 2.1.4).
    """
    heads, width, value = config.num_heads, config.head_dim, config.value_dim
    pair = config.num_layers * (width + value)
    return {
        "this model": sum(layout.num_elements for layout in config.kv_layouts),
        "MHA": heads * pair,
        "GQA, 8 heads share": -(-heads // 8) * pair,
        "MQA": pair,
        "MLA": config.num_layers * (value * 9 // 2),
    }
