"""SparseGPT: pruning by optimal brain surgery, columns in order (Frantar and Alistarh 2023, arXiv 2301.00774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flash_llm.prune.hessian import inverse_root, solve
from flash_llm.prune.method import lowest, register
from flash_llm.prune.statistics import Hessian, Need


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT:
    """Drop weights column by column, and let those further right make up for each.

    Which weights go is decided for ``block`` columns at a time, over all rows together, when their turn comes: by
    ``w^2 / [H^-1]_jj``, H being that of the columns not yet passed. Each block drops its share, so that the layer has
    exactly ``floor(M * K * sparsity)`` zeros, and its rows may differ.

    Attributes:
        block: columns whose weights are chosen together.
        damping: added to the Hessian's diagonal, relative to the diagonal's mean.
    """

    block: int = 128
    damping: float = 0.01
    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[Need] = "hessian"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1 column.")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping} must be positive: 0.01 is the paper's.")

    def prune(self, weight: Tensor, statistics: Hessian, sparsity: float) -> Tensor:
        """See :meth:`flash_llm.prune.method.Pruner.prune`."""
        return solve(weight, statistics, sparsity, self._solve)

    def _solve(self, weight: Tensor, hessian: Tensor, zeros: int) -> Tensor:
        root = inverse_root(hessian, self.damping)
        columns = weight.shape[1]
        result = weight.T.clone(memory_format=torch.contiguous_format)  # a column of the weight lies together
        dropped = 0
        for start in range(0, columns, self.block):
            end = min(start + self.block, columns)
            share = zeros * end // columns - dropped
            corner = root[start:end, start:end]
            score = (result[start:end] / corner.diagonal()[:, None]).square()
            mask = lowest(score.reshape(1, -1), share).view_as(score)
            errors = _sweep(result[start:end], mask, corner)
            result[end:] -= root[start:end, end:].T @ errors
            dropped += share
        return result.T.contiguous()


def _sweep(weight: Tensor, mask: Tensor, root: Tensor) -> Tensor:
    """Drop the masked weights of a block ``[columns, M]`` in place, one column after the other.

    Returns:
        How much each drop asks of the columns behind the block, ``[columns, M]``, in units of ``root``'s rows.
    """
    errors = torch.zeros_like(weight)
    for j in range(len(weight)):
        torch.div(weight[j] * mask[j], root[j, j], out=errors[j])
        weight[j:] -= torch.outer(root[j, j:], errors[j])
    weight.masked_fill_(mask, 0.0)
    return errors
