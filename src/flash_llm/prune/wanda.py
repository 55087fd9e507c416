"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flash_llm.prune.method import drop_lowest, register, zeros_of
from flash_llm.prune.statistics import InputNorm, Need


@register("wanda")
@dataclass(frozen=True)
class Wanda:
    """Drop, in each output row, the weights of lowest ``|W_ij| * ||X_j||_2``.

    ``||X_j||_2`` is the norm of input feature j over all tokens of the calibration data. Each row has exactly
    ``floor(K * sparsity)`` zeros. The weights that stay are not changed.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[Need] = "norm"

    def prune(self, weight: Tensor, statistics: InputNorm, sparsity: float) -> Tensor:
        """See :meth:`flash_llm.prune.method.Pruner.prune`."""
        score = weight.abs().float() * statistics.norm.to(weight.device)
        return drop_lowest(weight, score, zeros_of(weight.shape[1], sparsity))
