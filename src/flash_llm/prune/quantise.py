"""Rounding a pruned layer to 8-bit values, so that the weights make up for each other's rounding.

The zeros stay where the pruning method put them. Each row is rounded to nearest, and then its kept weights are visited
in turn: each takes the 8-bit value that is best while the others are as they are. That is coordinate descent on the
error of the layer's outputs against the *unpruned* weight (QuantEase, Behdin et al. 2023, arXiv 2309.01885), so that
the same steps compensate for what was dropped and for what was rounded. No step makes the error larger: the result is
never worse than rounding alone. SparseGPT's own way of rounding within its sweep (section 3.5 of arXiv 2301.00774)
passes each column once, and what it moves to weights that are dropped is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_llm.prune.hessian import damped
from flash_llm.prune.statistics import Hessian, Statistics
from flash_llm.tensor import ValueKind
from flash_llm.tensor.quantise import choose_scales, rounded

PASSES = 3
"""Times that each weight is visited: what a fourth would gain is small beside what the first three do."""

DAMPING = 0.01
"""Added to the Hessian's diagonal, relative to the diagonal's mean: the solvers' own."""

_BLOCK = 128


@dataclass(frozen=True)
class Quantised:
    """A layer that 8 bits hold exactly.

    Attributes:
        weight: ``[M, K]``, each row a multiple of its scale by values of the kind, rounded to the weight's dtype.
        scales: float32 ``[M]``.
    """

    weight: Tensor
    scales: Tensor


def quantise(weight: Tensor, pruned: Tensor, statistics: Statistics | None, kind: ValueKind) -> Quantised:
    """Round a pruned layer.

    Scales are chosen first, by the squared error of rounding the pruned weights. Some kept weights may round to zero.

    Args:
        weight: as it was before pruning, ``[M, K]``.
        pruned: its zeros stay.
        statistics: of the layer's inputs. A Hessian lets weights make up for each other; anything else, and None, is
            rounded to nearest.
        kind: of 8 bits.

    Raises:
        ValueError: the result has numbers too large for the weight's dtype.
    """
    scales = choose_scales(pruned, kind)
    values = rounded(pruned.float(), scales, kind)
    if isinstance(statistics, Hessian):
        hessian = statistics.matrix.to(weight.device)
        live = hessian.diagonal() > 0  # weights of other inputs do nothing, for better or worse
        if bool(live.all()):
            values = descend(values, weight.float(), pruned != 0, scales, kind, hessian)
        elif bool(live.any()):
            problem = (values[:, live], weight[:, live].float(), pruned[:, live] != 0)
            values[:, live] = descend(*problem, scales, kind, hessian[live][:, live])
    result = values.to(weight.dtype)
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"The rounded weights reach {values.abs().max():.3g}, too large for {weight.dtype}: convert the model to "
            "bfloat16 or float32."
        )
    return Quantised(result, scales)


def descend(
    values: Tensor, weight: Tensor, kept: Tensor, scales: Tensor, kind: ValueKind, hessian: Tensor, passes: int = PASSES
) -> Tensor:
    """Coordinate descent over 8-bit values, column by column, all rows at a time.

    Args:
        values: where to start, float32 ``[M, K]``, of the kind times ``scales``.
        weight: what is to be approached, float32 ``[M, K]``.
        kept: which values may be other than zero.
        scales: float32 ``[M]``.
        kind: of 8 bits.
        hessian: float32 ``[K, K]``, with nothing on its diagonal that is not positive.
        passes: times that each column is visited.

    Returns:
        The values, of no larger ``tr((V - W) (H + damping) (V - W)^T)`` than those at the start.
    """
    hessian = damped(hessian, DAMPING)
    values, columns = values.clone(), values.shape[1]
    for start in list(range(0, columns, _BLOCK)) * passes:
        block = slice(start, min(start + _BLOCK, columns))
        slope = (weight - values) @ hessian[:, block]  # half of it, and downwards
        corner = hessian[block, block]
        for j in range(len(corner)):
            column = start + j
            best = values[:, column] + slope[:, j] / corner[j, j]
            best = rounded(best[:, None], scales, kind)[:, 0].masked_fill(~kept[:, column], 0.0)
            slope -= torch.outer(best - values[:, column], corner[j])
            values[:, column] = best
    return values
