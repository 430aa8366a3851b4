"""What a backend adds up of its steps while somebody watches; nothing is added up otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.architecture import ModelConfig


@dataclass(frozen=True, slots=True)
class Observed:
    """Sums to which each step adds; whoever reads them may set them to 0.

    Attributes:
        sample_seconds: [1], in which tokens were chosen of logits.
        expert_rows: [num_layers, most experts of a layer], the rows that each expert computed; of numpy, or of torch
            where the steps are computed elsewhere; None without experts.
    """

    sample_seconds: NDArray[np.float64]
    expert_rows: Any

    @classmethod
    def of(cls, config: ModelConfig) -> Observed:
        most = max(layer.mixture.num_experts if layer.mixture else 0 for layer in config.layers)
        return cls(np.zeros(1), np.zeros((config.num_layers, most), np.int64) if most else None)
