"""Magnitude pruning: the smallest absolute values go. Needs no calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flash_llm.prune.method import drop_lowest, register, zeros_of
from flash_llm.prune.statistics import Need


@register("magnitude")
@dataclass(frozen=True)
class Magnitude:
    """Drop the weights of smallest magnitude.

    Attributes:
        per_row: compare within each output row, which then has exactly ``floor(K * sparsity)`` zeros. By default
            weights are compared over the whole tensor, which has exactly ``floor(M * K * sparsity)``.
    """

    per_row: bool = False
    name: ClassVar[str] = "magnitude"
    needs: ClassVar[Need] = "none"

    def prune(self, weight: Tensor, statistics: Any, sparsity: float) -> Tensor:
        """See :meth:`flash_llm.prune.method.Pruner.prune`."""
        rows = weight if self.per_row else weight.reshape(1, -1)
        return drop_lowest(rows, rows.abs().float(), zeros_of(rows.shape[1], sparsity)).reshape(weight.shape)
