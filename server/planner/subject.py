"""What a plan is made of: the model, read from headers or from a `config.json` alone, and the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.model.architecture import DTYPE_BYTES, ModelConfig
from shoal.model.checkpoint.config import read_config
from shoal.model.checkpoint.families import Tensors
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.format import open_checkpoint
from shoal.model.checkpoint.hf_folder import read_json
from shoal.model.checkpoint.load import imply_record, outline_checkpoint
from shoal.model.checkpoint.parts import Fields
from shoal.model.record import ModelRecord
from shoal.scheduler.errors import ConfigError
from shoal.server.planner.costs import Costs, Split, Step, check_split
from shoal.server.planner.machines import MACHINES, Machine, measure_machine

_USUAL_CONTEXT = 4096
_SECONDS = 0.6  # for the machine's products, and for its reading
# Far beyond any model: such numbers are mistakes, and arrays of such shapes cannot be.
_MOST = {"vocab_size": 1 << 26, "max_position_embeddings": 1 << 28}
_MOST_WIDTH, _MOST_EXPERTS = 1 << 24, 1 << 16


@dataclass(frozen=True)
class Subject:
    """A model on a machine.

    Attributes:
        record: with zeros for all numbers.
        context: tokens of a sequence.
    """

    record: ModelRecord
    machine: Machine
    costs: Costs
    context: int


def place(record: ModelRecord, machine: str, *, context: int | None, asked: Split) -> Subject:
    """The model on a machine, which is measured or looked up.

    Raises:
        ConfigError: more is asked for than the model has.
    """
    most = record.config.max_position_embeddings
    if context is not None and context > most:
        raise ConfigError(f"context {context}: the model can have at most {most} tokens", param="context")
    length = min(_USUAL_CONTEXT, most) if context is None else context
    dtype = "float32" if machine == "auto" else record.config.dtype
    costs = Costs.of(record, dtype, DTYPE_BYTES[dtype])
    check_split(costs, asked)
    found = measure_for(costs, length, _SECONDS) if machine == "auto" else MACHINES[machine]
    return Subject(record, found, costs, length)


def measure_for(costs: Costs, context: int, seconds: float) -> Machine:
    """This machine as a decode step of one sequence finds it; see `measure_machine`."""
    return measure_machine(costs.bytes_read(Step.decode(1, context)), seconds)


def read_shapes(model: str) -> ModelRecord:
    """The record of a checkpoint folder, a GGUF file or a `config.json`; only what describes the model is read.

    Raises:
        CheckpointError: it cannot be found or read, or a number is absurd.
    """
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return imply_shapes(Fields(path, read_json(path)))
    opened = open_checkpoint(resolve_checkpoint(model))
    config, tensors = read_config(opened.config())
    if opened.path.suffix == ".gguf":  # whose formats no configuration tells
        _refuse_absurd(opened.path, config)
        return outline_checkpoint(opened)
    return _implied(opened.path, config, opened.own_tensors(tensors))


def imply_shapes(fields: Fields) -> ModelRecord:
    """The record of the fields of a `config.json`.

    Raises:
        CheckpointError: one is missing, unknown or absurd.
    """
    config, tensors = read_config(fields)
    return _implied(fields.path, config, tensors)


def _implied(path: Path, config: ModelConfig, tensors: Tensors) -> ModelRecord:
    _refuse_absurd(path, config)
    return imply_record(path, config, tensors)


def _refuse_absurd(path: Path, config: ModelConfig) -> None:
    names = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings")
    sizes = [(name, getattr(config, name), _MOST.get(name, _MOST_WIDTH)) for name in names]
    for layer in set(config.layers):
        sizes.append(("intermediate_size", layer.intermediate_size, _MOST_WIDTH))
        if layer.mixture:
            sizes += [
                ("intermediate_size of experts", layer.mixture.intermediate_size, _MOST_WIDTH),
                ("intermediate_size of shared experts", layer.mixture.shared_size, _MOST_WIDTH),
            ]
    num_experts = sum(layer.mixture.num_experts for layer in config.layers if layer.mixture)
    sizes.append(("num_experts of all layers", num_experts, _MOST_EXPERTS))
    if config.latent:
        widths = asdict(config.latent).items()
        sizes += [(f"latent attention's {name}", width, _MOST_WIDTH) for name, width in widths]
    for name, size, most in sizes:
        if size > most:
            raise Fields(path, {}).error(name, f"expected an integer of at most {most}, found {size}")
