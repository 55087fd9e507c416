"""ALPS: pruning by ADMM, then refitting what is left (Meng et al., NeurIPS 2024, arXiv 2406.07831)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flash_llm.prune.hessian import damped, solve
from flash_llm.prune.method import lowest, register
from flash_llm.prune.statistics import Hessian, Need

_CHECK_EVERY = 3  # iterations between two looks at the support, as in the paper
_RHO_START = 0.1
_RHO_MIN, _RHO_MAX = 1e-5, 1e6


@register("alps")
@dataclass(frozen=True)
class ALPS:
    """Drop the weights of a layer together, by alternating directions, and refit those that stay.

    The problem is scaled so that all inputs have norm one. ADMM splits it into a dense copy B of the weights, which
    minimises the layer's error, and a sparse one D, which has its nonzeros where ``B + V / rho`` is largest over the
    whole layer. The penalty rho, which pulls them together, grows with how much the support of D still changes, until
    it stays. Then conjugate gradients on that support, all rows at a time, find the best values. The layer has exactly
    ``floor(M * K * sparsity)`` zeros, and its rows may differ.

    Attributes:
        iterations: of ADMM, at most.
        refit: iterations of conjugate gradients, at most.
        damping: added to the Hessian's diagonal, relative to the diagonal's mean.
    """

    iterations: int = 300
    refit: int = 10
    damping: float = 0.01
    name: ClassVar[str] = "alps"
    needs: ClassVar[Need] = "hessian"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.refit < 0:
            raise ValueError(f"iterations={self.iterations} must be at least 1, refit={self.refit} not negative.")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping} must be positive: 0.01 is the paper's.")

    def prune(self, weight: Tensor, statistics: Hessian, sparsity: float) -> Tensor:
        """See :meth:`flash_llm.prune.method.Pruner.prune`."""
        return solve(weight, statistics, sparsity, self._solve)

    def _solve(self, weight: Tensor, hessian: Tensor, zeros: int) -> Tensor:
        hessian = damped(hessian, self.damping)
        scale = hessian.diagonal().sqrt()
        hessian.div_(scale).div_(scale[:, None])
        dense = weight * scale
        target = dense @ hessian
        sparse = split(dense, target, hessian, zeros, self.iterations)
        return refit(sparse, target, hessian, self.refit) / scale


def split(dense: Tensor, target: Tensor, hessian: Tensor, zeros: int, iterations: int) -> Tensor:
    """ADMM: a matrix with ``zeros`` zeros that nearly minimises ``tr((D - W) H (D - W)^T)``.

    Args:
        dense: W, float32 ``[M, K]``.
        target: W H.
        hessian: H, positive definite, with ones on its diagonal.
        zeros: how many.
        iterations: at most.

    Returns:
        D, ``[M, K]``.
    """
    rho = _RHO_START
    growing = False
    sparse = _project(dense, zeros)
    support = sparse != 0
    kept = dense.numel() - zeros
    dual = torch.zeros_like(dense)
    inverse = _shifted_inverse(hessian, rho)
    for iteration in range(1, iterations + 1):
        free = (target - dual + rho * sparse) @ inverse
        sparse = _project(free + dual / rho, zeros)
        dual += rho * (free - sparse)
        if iteration % _CHECK_EVERY:
            continue
        before, support = support, sparse != 0
        changed = int((support != before).sum())
        factor = _growth(changed / kept)
        if factor > 1 and (growing or changed > 0.005 * kept):
            growing = True
            rho = min(rho * factor, _RHO_MAX)
        elif growing or rho < _RHO_MIN:
            break  # the support is stable
        else:  # rho was so large from the start that it held the support where it was: start again with less
            rho /= 5
            sparse = _project(dense, zeros)
            support = sparse != 0
            dual.zero_()
        del inverse  # before there is another: it may take gigabytes
        inverse = _shifted_inverse(hessian, rho)  # noqa: F841  the next iteration uses it
    return sparse


def refit(sparse: Tensor, target: Tensor, hessian: Tensor, iterations: int, tolerance: float = 1e-6) -> Tensor:
    """Conjugate gradients for the best values of the nonzeros, each row a problem of its own, all at a time.

    H has ones on its diagonal, which is what Jacobi's preconditioner would make of it.

    Args:
        sparse: where to start, and the support, float32 ``[M, K]``.
        target: W H.
        hessian: H, positive definite.
        iterations: at most.
        tolerance: ends it once each row's gradient is so small, relative to the target.

    Returns:
        The refitted matrix, zero where ``sparse`` is.
    """
    support = sparse != 0
    values = sparse.clone()
    residual = (target - values @ hessian) * support
    step = residual.clone()
    size = residual.square().sum(dim=1, keepdim=True)
    enough = tolerance**2 * target.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        if bool((size <= enough).all()):
            break
        curved = (step @ hessian) * support
        length = _ratio(size, (step * curved).sum(dim=1, keepdim=True))
        values += length * step
        residual -= length * curved
        before, size = size, residual.square().sum(dim=1, keepdim=True)
        step = residual + _ratio(size, before) * step
    return values


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 for a row that is solved already."""
    return torch.where(b > 0, a / b, 0.0)


def _growth(change: float) -> float:
    """The paper's schedule: by which factor rho grows when this share of the support has changed."""
    return 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1 if change > 0 else 1.0


def _project(matrix: Tensor, zeros: int) -> Tensor:
    """The nearest matrix with ``zeros`` zeros."""
    return matrix.masked_fill(lowest(matrix.square().reshape(1, -1), zeros).view_as(matrix), 0.0)


def _shifted_inverse(hessian: Tensor, rho: float) -> Tensor:
    """``(H + rho)^-1``.

    The paper takes it from one eigendecomposition of H. A Cholesky factorisation for each rho is quicker: half the work
    of multiplying the eigenvectors out, and no eigendecomposition.
    """
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    lower = torch.linalg.cholesky(shifted)
    del shifted
    return torch.cholesky_inverse(lower)
