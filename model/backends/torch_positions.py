"""What depends on a token's position alone: rotations, and temperatures of queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.model.architecture import ModelConfig, RopeConfig, Temperature
from shoal.model.backends.rope import rope_tables, temperature_table


@dataclass(frozen=True, slots=True)
class PositionFactors:
    """Of all positions, or of those of a step's T tokens.

    Attributes:
        ropes: cos and sin, each [T, 1, 2, dim / 2]; sin is negated at [:, :, 0].
        temperatures: [T, 1, 1].
    """

    ropes: dict[RopeConfig | None, tuple[Tensor, Tensor]]
    temperatures: dict[Temperature | None, Tensor]

    @classmethod
    def of_all(
        cls, config: ModelConfig, num_positions: int, device: torch.device, dtype: torch.dtype
    ) -> PositionFactors:
        def rotations(rope: RopeConfig) -> tuple[Tensor, Tensor]:
            cos, sin = (torch.from_numpy(table) for table in rope_tables(rope, num_positions))
            tables = torch.stack((cos, cos), dim=1), torch.stack((-sin, sin), dim=1)
            cos, sin = (table[:, None].to(device, dtype) for table in tables)
            return cos, sin

        def factors(temperature: Temperature) -> Tensor:
            table = temperature_table(temperature, num_positions)
            return torch.from_numpy(table)[:, None, None].to(device, dtype)

        return cls(
            {layer.rope: rotations(layer.rope) for layer in config.layers if layer.rope},
            {layer.temperature: factors(layer.temperature) for layer in config.layers if layer.temperature},
        )

    def at(self, positions: Tensor) -> PositionFactors:
        """Those at `positions` [T]."""
        return PositionFactors(
            {
                rope: (cos.index_select(0, positions), sin.index_select(0, positions))
                for rope, (cos, sin) in self.ropes.items()
            },
            {name: factors.index_select(0, positions) for name, factors in self.temperatures.items()},
        )
