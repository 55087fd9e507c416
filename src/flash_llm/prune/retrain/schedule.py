"""Pruning while training: what a schedule is, and the gradual one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from flash_llm.prune.method import zeros_of
from flash_llm.prune.retrain.masks import Masks
from flash_llm.prune.retrain.processes import own
from flash_llm.prune.retrain.select import lowest_of_all


class Schedule(Protocol):
    """What happens to the masks in a step of training. Steps are counted from 1; a run has ``begin`` to ``end``."""

    def after_backward(self, step: int) -> None:
        """The gradients of a batch are there, as the loss made them."""

    def before_update(self, step: int) -> bool:
        """They are masked and clipped, and the optimizer comes next. Whether something was added to them."""
        ...

    def after_update(self, step: int) -> None:
        """The optimizer is done."""

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep, besides the masks."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up :meth:`state`."""


class Hold:
    """The masks stay as they are."""

    def after_backward(self, step: int) -> None:
        pass

    def before_update(self, step: int) -> bool:
        return False

    def after_update(self, step: int) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        pass


class Targets:
    """How many weights are to be dropped, on the way from what a model has to a share of zeros.

    Args:
        masks: as they are at the beginning.
        sparsity: share of zeros at the end; of each layer, or of all together.
        scope: "layer" or "global".

    Raises:
        ValueError: no layer, or not all of them together, has fewer zeros than that.
    """

    def __init__(self, masks: Masks, sparsity: float, scope: str) -> None:
        self._masks = masks
        names = list(masks.dropped)
        self.groups = [names] if scope == "global" else [[name] for name in names]
        self.first = [masks.zeros(*group) for group in self.groups]
        sizes = [masks.count(*group) for group in self.groups]
        self.last = [max(now, zeros_of(size, sparsity)) for now, size in zip(self.first, sizes, strict=True)]
        if self.first == self.last:
            share = sum(self.first) / sum(sizes)
            raise ValueError(
                f"sparsity={sparsity} is no more than the model has, {share:.4f}: name more, or leave it out to hold "
                "the zeros that are there."
            )

    def drop(self, scores: Mapping[str, Tensor], share: float) -> None:
        """Drop weights of the lowest scores until ``share`` of the way is done.

        Args:
            scores: float32, not negative, of the masks' shapes.
            share: 0 to 1.
        """
        for group, chosen in self._chosen(scores, share):
            for name, more in zip(group, chosen, strict=True):
                self._masks.drop(name, more)

    def select(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which weights would be dropped at the end of the way, those that are now among them."""
        return {
            name: more | self._masks.dropped[name]
            for group, chosen in self._chosen(scores, 1.0)
            for name, more in zip(group, chosen, strict=True)
        }

    def _chosen(self, scores: Mapping[str, Tensor], share: float) -> list[tuple[list[str], list[Tensor]]]:
        result = []
        for group, first, last in zip(self.groups, self.first, self.last, strict=True):
            more = first + round(share * (last - first)) - self._masks.zeros(*group)
            open_scores = [scores[name].masked_fill(self._masks.dropped[name], torch.inf) for name in group]
            result.append((group, lowest_of_all(open_scores, max(0, more), self._masks.processes)))
        return result


class Gradual:
    """Prune a little, train, and again, along ``1 - (1 - t)**3`` (Zhu and Gupta, arXiv 1710.01878).

    Args:
        masks: of the layers to prune.
        targets: how many weights to drop.
        score: "magnitude": ``|w|``. "taylor": the sum of ``|w * dL/dw|`` over the steps since the last round, where L
            is the loss of a step's batch.
        begin, end: steps between which the rounds lie; the last is at ``end``.
        rounds: how many.
    """

    def __init__(self, masks: Masks, targets: Targets, score: str, begin: int, end: int, rounds: int) -> None:
        self._masks, self._targets = masks, targets
        self._marks = {begin + round(index * (end - begin) / rounds): index / rounds for index in range(1, rounds + 1)}
        self._end = end
        self._sums = (
            {
                name: torch.zeros_like(own(weight.detach()), dtype=torch.float32)
                for name, weight in masks.weights.items()
            }
            if score == "taylor"
            else None
        )

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if self._sums is None or step > self._end:
            return
        for name, weight in self._masks.weights.items():
            if weight.grad is not None:
                self._sums[name] += (own(weight) * own(weight.grad)).abs_()

    def before_update(self, step: int) -> bool:
        return False

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        if step not in self._marks:
            return
        if self._sums is None:
            scores = {name: own(weight.detach()).abs() for name, weight in self._masks.weights.items()}
        else:
            scores = self._sums
        self._targets.drop(scores, 1 - (1 - self._marks[step]) ** 3)
        if self._sums is not None:
            for total in self._sums.values():
                total.zero_()

    def state(self) -> dict[str, Tensor]:
        return {f"score.{name}": total for name, total in (self._sums or {}).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, total in (self._sums or {}).items():
            total.copy_(state[f"score.{name}"])
