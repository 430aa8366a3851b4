"""The table: each family's row, by its `model_type`."""

from __future__ import annotations

from shoal.model.checkpoint.families.dense import DENSE
from shoal.model.checkpoint.families.family import Family
from shoal.model.checkpoint.families.mixtures import MIXTURES
from shoal.model.checkpoint.families.older import OLDER

FAMILIES: dict[str, Family] = OLDER | DENSE | MIXTURES
