"""How a model's sparsity is spread over its layers.

An allocation other than the uniform one surveys the dense model first, one block at a time, and says what it learnt of
each as JSON data. Then it gives every layer a sparsity, so that of all weights together the wanted share is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flash_llm.prune.alps import ALPS
from flash_llm.prune.magnitude import Magnitude
from flash_llm.prune.method import Pruner
from flash_llm.prune.sparsegpt import SparseGPT
from flash_llm.prune.statistics import Need, Statistics

# No layer is emptied: beyond, its outputs are noise whatever the curve says.
_HIGHEST = 0.99


@dataclass(frozen=True)
class Block:
    """A dense block on the device, as a survey sees it.

    Attributes:
        weights: of its layers to prune, by name, ``[M, K]``.
        statistics: of their inputs; None where the survey needs none.
        replace: puts a weight into a layer.
        outputs: runs the block on the first n calibration windows, each ``[1, tokens, width]``.
    """

    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Statistics | None]
    replace: Callable[[str, Tensor], None]
    outputs: Callable[[int], Iterator[Tensor]]


@runtime_checkable
class Allocation(Protocol):
    """A way to spread sparsity. Its ``repr`` must show its options, as a method's."""

    @property
    def name(self) -> str:
        """As in ``ALLOCATIONS``."""
        ...

    @property
    def surveys(self) -> bool:
        """Whether the dense model has to be looked at first."""
        ...

    def needs(self, pruner: Pruner) -> Need:
        """The statistic that its survey needs."""
        ...

    def survey(self, block: Block, pruner: Pruner, sparsity: float) -> Any:
        """What is to be known of a block, as JSON data."""
        ...

    def spread(self, surveys: Sequence[Any], sizes: Sequence[Mapping[str, int]], sparsity: float) -> dict[str, float]:
        """Each layer's sparsity.

        Args:
            surveys: of all blocks, in order; nothing if there is no survey.
            sizes: number of weights of each block's layers, by name.
            sparsity: of all these weights together.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """The same sparsity in all layers."""

    name: ClassVar[str] = "uniform"
    surveys: ClassVar[bool] = False

    def needs(self, pruner: Pruner) -> Need:
        return "none"

    def survey(self, block: Block, pruner: Pruner, sparsity: float) -> None:
        return None

    def spread(self, surveys: Sequence[Any], sizes: Sequence[Mapping[str, int]], sparsity: float) -> dict[str, float]:
        return {name: sparsity for block in sizes for name in block}


@dataclass(frozen=True)
class Given:
    """Sparsities that are known already: from another run, whose survey is not to be made again, or by hand.

    Attributes:
        shares: each layer's sparsity, by the layers' names.
    """

    shares: Mapping[str, float]
    name: ClassVar[str] = "given"
    surveys: ClassVar[bool] = False

    def needs(self, pruner: Pruner) -> Need:
        return "none"

    def survey(self, block: Block, pruner: Pruner, sparsity: float) -> None:
        return None

    def spread(self, surveys: Sequence[Any], sizes: Sequence[Mapping[str, int]], sparsity: float) -> dict[str, float]:
        names = [name for block in sizes for name in block]
        if missing := [name for name in names if not 0 <= self.shares.get(name, -1.0) < 1]:
            raise ValueError(f"{missing[0]} has the sparsity {self.shares.get(missing[0])}: name one in [0, 1) for it.")
        return {name: self.shares[name] for name in names}


@dataclass(frozen=True)
class OWL:
    """Blocks with more outliers keep more weights (Yin et al., ICML 2024, arXiv 2310.05175).

    A block's outliers are the share of its weights whose Wanda score ``|W_ij| ||X_j||`` is more than ``threshold``
    times the block's mean. Densities are spread linearly by it over a range of ``2 * reach``, one for all of a block's
    layers. The range shrinks where it would leave [0, 0.99].

    Attributes:
        threshold: the paper's M, 3 to 10.
        reach: the paper's lambda.
    """

    threshold: float = 5.0
    reach: float = 0.08
    name: ClassVar[str] = "owl"
    surveys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.threshold > 0 or not 0 <= self.reach < 0.5:
            raise ValueError(f"threshold={self.threshold} must be positive, reach={self.reach} in [0, 0.5).")

    def needs(self, pruner: Pruner) -> Need:
        return "norm"

    def survey(self, block: Block, pruner: Pruner, sparsity: float) -> float:
        """The block's share of outliers."""
        scores = [
            (name, weight, statistic.norm)  # type: ignore[attr-defined]  # an InputNorm, as it asked for
            for name, weight in block.weights.items()
            if (statistic := block.statistics[name]) is not None and statistic.tokens
        ]
        total = sum((w.abs().double() * norm).sum().item() for _, w, norm in scores)
        elements = sum(weight.numel() for _, weight, _ in scores)
        if not elements:
            return 0.0
        limit = self.threshold * total / elements
        return sum(int((w.abs().float() * norm > limit).sum()) for _, w, norm in scores) / elements

    def spread(self, surveys: Sequence[Any], sizes: Sequence[Mapping[str, int]], sparsity: float) -> dict[str, float]:
        weights = [sum(block.values()) for block in sizes]
        used = [share for share, weight in zip(surveys, weights, strict=True) if weight]
        low, span = min(used), max(used) - min(used)
        # From -1/2 (fewest outliers) to 1/2, then around their mean, so that the total comes out.
        places = [(share - low) / span - 0.5 if span else 0.0 for share in surveys]
        mean = sum(place * weight for place, weight in zip(places, weights, strict=True)) / sum(weights)
        offsets = [mean - place for place in places]
        width = 2 * self.reach
        for offset, weight in zip(offsets, weights, strict=True):
            if weight and offset:
                room = _HIGHEST - sparsity if offset > 0 else sparsity
                width = min(width, max(room, 0.0) / abs(offset))
        return {
            name: max(0.0, sparsity + width * offset)
            for block, offset in zip(sizes, offsets, strict=True)
            for name in block
        }


@dataclass(frozen=True)
class LeastError:
    """Sparsity goes where it disturbs the blocks' outputs least.

    The survey prunes one layer at a time to ``points`` sparsities within ``reach`` of the wanted one, runs the block,
    and measures ``||y' - y||^2 / ||y||^2`` of its output y, the residual stream, averaged over tokens. (Over tokens,
    since a few have activations so large that they would drown all others; of the block and not of the layer, since a
    layer may be wrong by much where it adds little.) Errors of different layers are taken to add up. Then the total is
    least if each next weight is dropped where it costs least: on the lower convex hulls of the curves, in order of
    slope for a weight, until the budget is reached.

    Layers are pruned by the job's own method, for ALPS by SparseGPT, whose curves are alike and cost a tenth.

    Attributes:
        reach: how far a layer may be from the wanted sparsity. What is measured one by one is not true far away.
        points: on each curve.
        windows: of the calibration data that blocks are run on.
    """

    reach: float = 0.15
    points: int = 5
    windows: int = 8
    name: ClassVar[str] = "error"
    surveys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.reach < 1 or self.points < 2 or self.windows < 1:
            raise ValueError(
                f"reach={self.reach} must be in (0, 1), points={self.points} at least 2, "
                f"windows={self.windows} at least 1."
            )

    def needs(self, pruner: Pruner) -> Need:
        return self._surrogate(pruner).needs

    def survey(self, block: Block, pruner: Pruner, sparsity: float) -> dict[str, list[list[float]]]:
        """For each layer a list of [sparsity, error]."""
        surrogate = self._surrogate(pruner)
        dense = [output.clone() for output in block.outputs(self.windows)]
        curves: dict[str, list[list[float]]] = {}
        for name, weight in block.weights.items():
            statistic = block.statistics[name]
            unseen = statistic is not None and not statistic.tokens
            method: Pruner = Magnitude(per_row=True) if unseen else surrogate
            curves[name] = []
            for point in self._grid(sparsity):
                block.replace(name, method.prune(weight, statistic, point))
                curves[name].append([point, _difference(dense, block.outputs(self.windows))])
            block.replace(name, weight)
        return curves

    def spread(self, surveys: Sequence[Any], sizes: Sequence[Mapping[str, int]], sparsity: float) -> dict[str, float]:
        curves = {name: curve for block in surveys for name, curve in block.items()}
        size = {name: weights for block in sizes for name, weights in block.items()}
        result = {name: curve[0][0] for name, curve in curves.items()}
        budget = sparsity * sum(size.values()) - sum(size[name] * lowest for name, lowest in result.items())
        pieces = [
            ((b[1] - a[1]) / (b[0] - a[0]) / size[name], name, b[0] - a[0])
            for name, curve in curves.items()
            for a, b in pairwise(_lower_hull(curve))
        ]
        # The hull's slopes rise, so that a layer's pieces come in their order; of equal ones the first layer's.
        for _, name, length in sorted(pieces, key=lambda piece: piece[0]):
            taken = min(length, max(budget, 0.0) / size[name])
            result[name] += taken
            budget -= taken * size[name]
        return result

    def _grid(self, sparsity: float) -> list[float]:
        low, high = max(0.0, sparsity - self.reach), min(_HIGHEST, sparsity + self.reach)
        high = max(high, sparsity)
        return [low + (high - low) * i / (self.points - 1) for i in range(self.points)]

    def _surrogate(self, pruner: Pruner) -> Pruner:
        return SparseGPT(damping=pruner.damping) if isinstance(pruner, ALPS) else pruner


ALLOCATIONS: dict[str, Callable[[], Allocation]] = {"uniform": Uniform, "owl": OWL, "error": LeastError}


def _difference(expected: Sequence[Tensor], got: Iterator[Tensor]) -> float:
    """Mean over tokens of the squared difference relative to what is expected."""
    errors = []
    for a, b in zip(expected, got, strict=True):
        a, b = a.float(), b.float()
        size = a.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        errors.append(((b - a).square().sum(dim=-1) / size).mean())
    error = torch.stack(errors).mean().item()
    if not math.isfinite(error):
        raise ValueError("A block's outputs overflow; run with dtype=torch.bfloat16 or torch.float32.")
    return error


def _lower_hull(points: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The lower convex hull of points in order of their x."""
    hull: list[Sequence[float]] = []
    for point in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0]) >= (point[1] - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    return hull
