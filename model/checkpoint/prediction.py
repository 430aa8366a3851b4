"""Loads the module of multi-token prediction that belongs to a checkpoint."""

from __future__ import annotations

from dataclasses import replace

from shoal.model.checkpoint.config import read_config
from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint
from shoal.model.checkpoint.load import RecordBuilder
from shoal.model.checkpoint.tensors import FileTensors
from shoal.model.numbers import Array, shape_of
from shoal.model.prediction import Prediction
from shoal.model.record import Linear, ModelRecord, Norm
from shoal.scheduler.errors import CheckpointError

# Of a module that was trained for a checkpoint, in the checkpoint's own folder.
FOLDER = "mtp"


def load_prediction(checkpoint: CheckpointFormat, target: ModelRecord) -> Prediction:
    """Load the module: the one layer of the checkpoint in the folder `mtp`, if there is one, or else the layer after
    the target's last one (DeepSeek-V3, GLM-4.5).

    Raises:
        CheckpointError: there is no module, or a tensor of it is missing or of the wrong shape.
    """
    trained = checkpoint.path / FOLDER
    if trained.is_dir():
        return _load(open_checkpoint(trained), 0, target)
    if read_config(checkpoint.config())[1].further_layers:
        return _load(checkpoint, target.config.num_layers, target)
    raise _no_module(checkpoint)


def _load(checkpoint: CheckpointFormat, layer: int, target: ModelRecord) -> Prediction:
    """Load the module that is this layer of the checkpoint."""
    fields = checkpoint.config()
    config, tensors = read_config(replace(fields, values={**fields.values, "num_hidden_layers": layer + 1}))
    config = replace(config, layers=config.layers[layer:], tie_word_embeddings=True)
    file = FileTensors(checkpoint.weights(), tensors)
    prefix = tensors.names["layer"][0].format(layer)
    if f"{prefix}enorm.weight" not in file:  # many folders name it in config.json, and leave it out
        raise _no_module(checkpoint)
    return _PredictionBuilder(config, tensors, file).prediction(prefix, target)


def _no_module(checkpoint: CheckpointFormat) -> CheckpointError:
    message = f"{checkpoint.path}: has no module of multi-token prediction, neither a folder {FOLDER} nor a layer"
    return CheckpointError(message, param="model")


class _PredictionBuilder(RecordBuilder):
    """Takes the tensors of a module, which all belong to one layer."""

    def prediction(self, prefix: str, target: ModelRecord) -> Prediction:
        """The module in the layer that `prefix` names; what it shares with the target is the target's."""
        config = self._config
        hidden, states = config.hidden_size, target.config.hidden_size
        embedding = self._take_own(f"{prefix}embed_tokens.weight", None, target.embedding)
        head = self._take_own(f"{prefix}shared_head.head.weight", hidden, target.head.weight)
        width = shape_of(embedding)[1]
        feedback = None
        if hidden != states:
            feedback = Linear(self._file.take(f"{prefix}feedback.weight", states, hidden))
        return Prediction(
            model=ModelRecord(
                config=config,
                embedding=head,
                layers=(self._layer(config.layers[0], prefix),),
                norm=Norm(self._gain(f"{prefix}shared_head.norm.weight", hidden)),
                head=Linear(head),
            ),
            embedding=embedding,
            token_norm=self._gain(f"{prefix}enorm.weight", width),
            state_norm=self._gain(f"{prefix}hnorm.weight", states),
            projection=Linear(self._file.take(f"{prefix}eh_proj.weight", hidden, width + states)),
            feedback=feedback,
        )

    def _take_own(self, name: str, width: int | None, shared: Array) -> Array:
        """The module's own tensor [the target's vocab_size, width], or the one that it shares with the target."""
        return self._file.take(name, len(shared), width) if name in self._file else shared

    def _gain(self, name: str, width: int) -> Array:
        return self._offset(self._file.take(name, width))
