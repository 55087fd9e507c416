"""What a pruning method is, and the selection that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flash_llm.prune.statistics import Need


@runtime_checkable
class Pruner(Protocol):
    """A pruning method: which statistic of a layer's inputs it needs, and how it prunes one layer.

    Its ``repr`` must show its options: an interrupted job is only taken up again by an equal one.
    """

    @property
    def name(self) -> str:
        """As in ``METHODS``."""
        ...

    @property
    def needs(self) -> Need:
        """The statistic; ``"none"`` if the method needs no calibration data."""
        ...

    def prune(self, weight: Tensor, statistics: Any, sparsity: float) -> Tensor:
        """Prune a layer.

        Args:
            weight: finite, floating, ``[M, K]`` as in ``y = x @ weight.T``; is not changed.
            statistics: of the layer's inputs, as ``needs`` says; None if that is ``"none"``.
            sparsity: share of zeros, in [0, 1).

        Returns:
            The pruned weight: same shape, dtype and device.
        """
        ...


# 12 bytes each are returned by topk.
_TOPK_ELEMENTS = 1 << 26

METHODS: dict[str, Callable[[], Pruner]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: makes a method known under ``name``."""

    def add(method: type) -> type:
        METHODS[name] = method
        return method

    return add


def zeros_of(elements: int, sparsity: float) -> int:
    """Number of zeros among ``elements`` at ``sparsity``: ``floor(elements * sparsity)``, as in the papers' code.

    The tolerance makes 0.57 of 100 come out as 57, where the binary 0.57 is a little less.
    """
    return math.floor(elements * sparsity + 1e-6)


def drop_lowest(weight: Tensor, score: Tensor, zeros: int) -> Tensor:
    """Copy of ``weight [R, C]`` with the ``zeros`` elements of lowest ``score`` in each row set to zero.

    Weights that are zero already come first, whatever their score, so that each row has exactly ``zeros`` zeros, or as
    many as it had if those were more. Of equal scores those further left go first. The same bits on every run.
    """
    return weight.masked_fill(lowest(score.masked_fill(weight == 0, -1.0), zeros), 0.0)


def lowest(score: Tensor, count: int) -> Tensor:
    """Boolean mask of the ``count`` lowest elements in each row of ``score [R, C]``, of equals those further left."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = kth_lowest(score, count) if score.is_cuda else score.kthvalue(count, dim=1, keepdim=True).values
    below = score < threshold
    ties = score == threshold
    room = count - below.sum(dim=1, keepdim=True, dtype=torch.int32)
    return below | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= room))


def kth_lowest(score: Tensor, count: int) -> Tensor:
    """The ``count``-th lowest of each row of ``score [R, C]``, ``[R, 1]``: what ``kthvalue`` gives.

    On a GPU that gives a row to a single block, and a whole layer is one row here. ``topk`` gives it many, but returns
    all that lies below, so it is for scores that aren't many gigabytes. For those this halves the range of the values
    32 times, each time counting with all of the GPU. Numbers that are not negative are in the order of their bits; of
    negative ones only -1 may occur.

    Args:
        score: float32.
        count: at least 1.
    """
    if score.numel() <= _TOPK_ELEMENTS:
        return score.topk(count, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    bits = score.contiguous().view(torch.int32)
    low = torch.full((len(score), 1), -(1 << 31), dtype=torch.int64, device=score.device)
    high = torch.full_like(low, (1 << 31) - 1)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = (bits <= middle.int()).sum(dim=1, keepdim=True) >= count
        high = torch.where(enough, middle, high)
        low = torch.where(enough, low, middle + 1)
    return high.int().view(torch.float32)
