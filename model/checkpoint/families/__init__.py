"""The families of models as rows of one table."""

from shoal.model.checkpoint.families.family import Family, Mixture, Tensors
from shoal.model.checkpoint.families.table import FAMILIES

__all__ = ["FAMILIES", "Family", "Mixture", "Tensors"]
