"""What the solvers share that work on a layer's Hessian: the layer's problem, and its numerical care.

A layer ``y = x @ W.T`` with calibration inputs X is pruned so that ``||X (W - W')^T||^2 = tr((W - W') H (W - W')^T)``,
``H = X^T X``, stays small. The rows of W are independent in it and have H in common.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from flash_llm.prune.method import lowest, zeros_of
from flash_llm.prune.statistics import Hessian

# (weight [M, K], hessian [K, K], zeros) -> pruned weight; all float32, no input of H is dead, 0 < zeros < M * K.
Solver = Callable[[Tensor, Tensor, int], Tensor]
# A matrix that can't be factorised with so much more damping than asked for has no use as a Hessian.
_MORE_DAMPING = (1.0, 10.0, 100.0)


def solve(weight: Tensor, statistics: Hessian, sparsity: float, solver: Solver) -> Tensor:
    """Prune a layer with a solver, so that exactly ``floor(M * K * sparsity)`` weights are dropped.

    Weights whose input was zero in all of the calibration data contribute nothing to any output: they go first, the
    smallest of them if they are more than are to go. The solver gets the rest of the problem.

    Args:
        weight: floating ``[M, K]``; is not changed.
        statistics: of the layer's inputs.
        sparsity: share of zeros.
        solver: solves the problem without dead inputs.

    Returns:
        The pruned weight: same shape, dtype and device.

    Raises:
        ValueError: the solution has numbers too large for the weight's dtype.
    """
    hessian = statistics.matrix.to(weight.device)
    rows, columns = weight.shape
    zeros = zeros_of(weight.numel(), sparsity)
    if statistics.tokens < columns:
        warnings.warn(
            f"{statistics.tokens} calibration tokens don't determine {columns} inputs: more text gives better quality",
            stacklevel=2,
        )
    live = hessian.diagonal() > 0
    spare = rows * int((~live).sum())
    if zeros == 0:
        return weight.clone()
    if spare >= zeros:
        score = weight.abs().float().masked_fill(live, torch.inf)
        return weight.masked_fill(lowest(score.reshape(1, -1), zeros).view_as(weight), 0.0)
    if spare == 0:
        pruned = solver(weight.float(), hessian, zeros)
    else:
        pruned = torch.zeros_like(weight, dtype=torch.float32)
        pruned[:, live] = solver(weight[:, live].float(), hessian[live][:, live], zeros - spare)
    result = pruned.to(weight.dtype)
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"The weights that make up for the dropped ones reach {pruned.abs().max():.3g}, too large for "
            f"{weight.dtype}: convert the model to bfloat16 or float32, or take more calibration text."
        )
    return result


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Copy of H with ``damping`` times its mean diagonal added to the diagonal."""
    result = hessian.clone()
    result.diagonal().add_(damping * hessian.diagonal().mean())
    return result


def inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular R with ``R^T R = (H + damping)^-1``.

    With H reversed in both dimensions as ``L L^T``, H is U U^T with L reversed, which is upper triangular; R is U^-1.
    That takes one factorisation, not the three of inverting first, and loses fewer digits. If float32 doesn't do, the
    damping is raised tenfold, twice at most, and a warning says so.

    Raises:
        ValueError: H can't be factorised even so.
    """
    for more in _MORE_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping * more).flip(0, 1))
        if not bool(failed) and bool(lower.diagonal().isfinite().all()):
            if more > 1:
                warnings.warn(
                    f"the Hessian is singular and was damped by {damping * more:g}, not {damping:g}", stacklevel=2
                )
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            root = torch.linalg.solve_triangular(lower, identity, upper=False)
            del lower, identity  # gigabytes, for the largest layers
            return root.flip(0, 1)
    raise ValueError(
        f"The Hessian of {len(hessian)} inputs is not positive definite even with {damping * more:g} of its mean "
        "diagonal added: raise the damping, take more calibration text, or prune by Wanda, which needs no inverse."
    )


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """``tr((W - W') H (W - W')^T) / tr(W H W^T)``: the squared error of the layer's outputs, relative to the outputs.

    Args:
        weight: ``[M, K]``.
        pruned: ``[M, K]``.
        hessian: float32 ``[K, K]``.
    """
    difference, weight = weight.float() - pruned.float(), weight.float()
    return float(((difference @ hessian) * difference).double().sum() / ((weight @ hessian) * weight).double().sum())
