"""Which layers have a window, RoPE, or a mixture of experts: rules of which the rows of the table are made."""

from __future__ import annotations

from collections.abc import Callable

from shoal.model.checkpoint.families.family import CHUNKED, FULL, SLIDING, Kinds
from shoal.model.checkpoint.parts import Fields

# Which layers have a window


def everywhere(fields: Fields, count: int) -> list[str]:
    """A window in all layers, if the config names one (Mistral)."""
    return [SLIDING if fields.get("sliding_window") is not None else FULL] * count


def listed(otherwise: Kinds) -> Kinds:
    """As `layer_types` says, or as another rule does where it is missing; no windows if the config names no size."""

    def kinds(fields: Fields, count: int) -> list[str]:
        by_rule = otherwise(fields, count)
        given = fields.get("layer_types")
        if given is not None and (not isinstance(given, list) or len(given) != count):
            raise fields.error("layer_types", f"expected a list of {count} kinds, found {given!r}")
        for kind in given or ():
            if kind not in (FULL, SLIDING, CHUNKED):
                raise fields.error("layer_types", f"{kind!r} is not supported; supported: {FULL}, {SLIDING}, {CHUNKED}")
        if fields.get("sliding_window") is None:
            return [FULL if kind == SLIDING else kind for kind in given or by_rule]
        return given or by_rule

    return kinds


def all_but_every(period: int) -> Kinds:
    """A window in all layers but every `period`-th one (Gemma 3)."""

    def kinds(fields: Fields, count: int) -> list[str]:
        private = fields.get("_sliding_window_pattern")  # transformers 5 writes it so
        own = fields.get("sliding_window_pattern") or private or period
        if isinstance(own, str):  # a letter for each layer of a period, which ends with a full one (EXAONE 4)
            own = len(own)
        if isinstance(own, bool) or not isinstance(own, int) or own < 1:
            raise fields.error("sliding_window_pattern", f"expected an integer of at least 1, found {own!r}")
        return [SLIDING if (index + 1) % own else FULL for index in range(count)]

    return listed(kinds)


def switched(rule: Callable[[int, int], bool]) -> Kinds:
    """A window in the layers that a rule names, if `use_sliding_window` (Qwen 2).

    Args:
        rule: takes a layer's index and `max_window_layers`.
    """

    def kinds(fields: Fields, count: int) -> list[str]:
        bound = fields.integer("max_window_layers", minimum=0, default=28)
        given = listed(lambda fields, count: [SLIDING if rule(i, bound) else FULL for i in range(count)])(fields, count)
        return given if fields.flag("use_sliding_window", default=False) else [FULL] * count

    return kinds


def everywhere_if_used(fields: Fields, count: int) -> list[str]:
    """A window in all layers if `use_sliding_window` (Qwen 3 MoE)."""
    windows = everywhere(fields, count)
    return windows if fields.flag("use_sliding_window", default=False) else [FULL] * count


def from_window_layer(fields: Fields, count: int) -> list[str]:
    """A window in the layers from `max_window_layers` on (dots.llm1)."""
    first = fields.integer("max_window_layers", minimum=0, default=62)
    return [SLIDING if index >= first else FULL for index in range(count)]


def alternating(fields: Fields, count: int) -> list[str]:
    """Local and global attention by turns, as `attention_types` or `attention_layers` say (GPT-Neo)."""
    runs = fields.get("attention_types")
    kinds = fields.get("attention_layers")
    if kinds is None:
        try:
            kinds = [kind for kinds, times in runs for _ in range(times) for kind in kinds]
        except (TypeError, ValueError):
            raise fields.error("attention_types", f"expected pairs of kinds and a number, found {runs!r}") from None
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in ("global", "local") for kind in kinds):
        raise fields.error("attention_types", f"expected {count} kinds, of global and local, found {kinds!r}")
    return [SLIDING if kind == "local" else FULL for kind in kinds]


def chunks_with_rope(fields: Fields, count: int) -> list[str]:
    """Chunks in the layers with RoPE, if the config names a size of them (Llama 4)."""
    turns = rope_listed(fields, [FULL] * count)
    has_chunks = fields.get("attention_chunk_size") is not None
    return [CHUNKED if has_chunks and turn else FULL for turn in turns]


# Which layers have RoPE


def rope_listed(fields: Fields, kinds: list[str]) -> list[bool]:
    """Those with 1 in `no_rope_layers`, or all but every `no_rope_layer_interval`-th one (SmolLM3, Llama 4)."""
    period = fields.integer("no_rope_layer_interval", minimum=1, default=4)
    given = fields.get("no_rope_layers") or [int((index + 1) % period != 0) for index in range(len(kinds))]
    if not isinstance(given, list) or len(given) != len(kinds) or any(turns not in (0, 1) for turns in given):
        raise fields.error("no_rope_layers", f"expected {len(kinds)} times 0 or 1, found {given!r}")
    return [bool(turns) for turns in given]


def rope_in_windows(fields: Fields, kinds: list[str]) -> list[bool]:
    """Those with a window (Cohere 2)."""
    return [kind == SLIDING for kind in kinds]


def rope_in_windows_if_any(fields: Fields, kinds: list[str]) -> list[bool]:
    """Those with a window, or all if the config names no size of it (EXAONE 4)."""
    return [kind == SLIDING or fields.get("sliding_window") is None for kind in kinds]


def rope_without_alibi(fields: Fields, kinds: list[str]) -> list[bool]:
    """All, or none if there is ALiBi, where what the config says of RoPE does not count (Falcon)."""
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        fields.get(name)
    return [not fields.flag("alibi", default=False)] * len(kinds)


# Which layers have a mixture of experts


def from_layer(name: str, default: int = 0) -> Callable[[Fields, int], list[bool]]:
    """All from the layer on that the key names (DeepSeek)."""

    def layers(fields: Fields, count: int) -> list[bool]:
        first = fields.integer(name, minimum=0, default=default)
        return [index >= first for index in range(count)]

    return layers


def every_sparse_step(fields: Fields, count: int) -> list[bool]:
    """Every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name (Qwen 2 MoE)."""
    step = fields.integer("decoder_sparse_step", minimum=1, default=1)
    dense = _indices(fields, "mlp_only_layers")
    return [index not in dense and (index + 1) % step == 0 for index in range(count)]


def every_interleaved(fields: Fields, count: int) -> list[bool]:
    """The layers in `moe_layers`, or every `interleave_moe_layer_step`-th one (Llama 4)."""
    step = fields.integer("interleave_moe_layer_step", minimum=1, default=1)
    given = _indices(fields, "moe_layers")
    if fields.get("moe_layers") is not None:
        return [index in given for index in range(count)]
    return [(index + 1) % step == 0 for index in range(count)]


def within_layers(fields: Fields, count: int) -> list[bool]:
    """Every `moe_layer_interval`-th layer from one to another (ERNIE 4.5)."""
    first = fields.integer("moe_layer_start_index", minimum=0, default=1)
    last = fields.integer("moe_layer_end_index", minimum=-1, default=-1)
    step = fields.integer("moe_layer_interval", minimum=1, default=1)
    last = count - 1 if last == -1 else last
    return [first <= index <= last and (index + 1) % step == 0 for index in range(count)]


def _indices(fields: Fields, name: str) -> list[int]:
    given = fields.get(name) or []
    if not isinstance(given, list) or not all(isinstance(index, int) for index in given):
        raise fields.error(name, f"expected a list of layers, found {given!r}")
    return given
