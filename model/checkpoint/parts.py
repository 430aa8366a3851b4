"""The unchecked parts of a checkpoint, the same for every format.

They have the form of a Hugging Face folder: the fields of `config.json` and `generation_config.json`, the text of a
`tokenizer.json`, and the tensors of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoal.scheduler.errors import CheckpointError

if TYPE_CHECKING:  # it takes time to load, and the engine process does not need it
    from tokenizers import Tokenizer


# Of a message: a file may hold anything where a number should be.
_MOST_CHARS = 300


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed access to the fields of an object; every error names the file and the field.  null counts as missing.

    Attributes:
        names: the file's own names of fields, where they differ.
    """

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def own_name(self, name: str) -> str:
        """What the file calls the field."""
        name = self.prefix + name
        return self.names.get(name, name)

    def error(self, name: str, message: str) -> CheckpointError:
        message = message if len(message) <= _MOST_CHARS else f"{message[:_MOST_CHARS]}..."
        return CheckpointError(f"{self.path}: {self.own_name(name)}: {message}", param=self.path.name)

    def section(self, name: str, values: Mapping[str, Any]) -> Fields:
        """The fields of an object that is itself the field `name`."""
        return Fields(self.path, values, f"{self.prefix}{name}.", self.names)

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def integer(self, name: str, *, minimum: int, default: int | None = None) -> int:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"expected an integer of at least {minimum}, found {value!r}")
        return value

    def number(self, name: str, *, minimum: float, default: float | None = None) -> float:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < math.inf:
            raise self.error(name, f"expected a number of at least {minimum}, found {value!r}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, found {value!r}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name, minimum=0)

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name, minimum=0.0)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An id or a list of ids."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(name, f"expected a token id or a list of them, found {value!r}")
        return tuple(ids)

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        return value


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What makes a tokenizer.

    Attributes:
        tokenizer: as the library reads it.
        special_tokens: text of the special tokens by name, such as {"eos_token": "</s>"}.
        chat_templates: see `ChatTemplate`.
    """

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of zeros that takes no memory, and that nobody may write to."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a checkpoint.

    Attributes:
        path: the file that errors name.
        tensors: by the names that the file gives them; number formats as in `model/record.py`.
        own_name: gives the file's name for a Hugging Face name.
    """

    path: Path
    tensors: Mapping[str, NDArray[Any]]
    own_name: Callable[[str], str]
