"""Pruning as one problem of the whole model: the loss under a bound on the nonzeros, by ADMM.

In the way of ELSA (arXiv 2510.01650): min f(x) subject to x = z, z sparse, with the augmented Lagrangian
f(x) + lambda/2 |x - z + u|^2. The optimizer of the training works on x; now and then z becomes the projection of x + u
onto the sparse, and u grows by x - z. No layer's output stands in for the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from flash_llm.prune.retrain.masks import Masks
from flash_llm.prune.retrain.processes import own
from flash_llm.prune.retrain.schedule import Targets


class Admm:
    """The ADMM schedule. It needs 8 bytes a weight more than holding a mask does, for z and u.

    Args:
        masks: of the layers to prune; what is dropped already stays so.
        targets: how many weights to drop.
        optimizer: Adam or AdamW, whose second moments weigh the projection if ``score`` is "taylor".
        score: which weights a projection keeps. "magnitude": the largest ``|x + u|``. "taylor": the largest
            ``|x + u| * sqrt(v)`` with Adam's running mean v of squared gradients: the paper's projection.
        penalty: lambda at the end; it rises from zero as half a cosine.
        interval: steps between two projections.
        begin: step after which x is first projected, at least 1; before it nothing happens.
        end: step after which x is projected for good.
    """

    def __init__(
        self,
        masks: Masks,
        targets: Targets,
        optimizer: Optimizer,
        score: str,
        penalty: float,
        interval: int,
        begin: int,
        end: int,
    ) -> None:
        self._masks, self._targets, self._optimizer = masks, targets, optimizer
        self._score, self._penalty, self._interval = score, penalty, interval
        self._begin, self._end = begin, end
        self._z = {name: own(weight.detach()).clone() for name, weight in masks.weights.items()}
        self._u = {name: torch.zeros_like(weight) for name, weight in self._z.items()}

    def after_backward(self, step: int) -> None:
        pass

    @torch.no_grad()
    def before_update(self, step: int) -> bool:
        """Add the gradient of the penalty, which isn't clipped."""
        if not self._begin < step <= self._end:
            return False
        penalty = self.penalty(step)
        for name, weight in self._masks.weights.items():
            if weight.grad is not None:
                own(weight.grad).add_(own(weight) - self._z[name] + self._u[name], alpha=penalty)
        return True

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        if step == self._end:
            self._targets.drop(self._scores(), 1.0)
            self._z, self._u = {}, {}
        elif self._begin <= step < self._end and (step - self._begin) % self._interval == 0:
            self._project(grow=step > self._begin)

    def penalty(self, step: int) -> float:
        """lambda at a step."""
        return self._penalty * (1 - math.cos(math.pi * (step - self._begin) / (self._end - self._begin))) / 2

    def state(self) -> dict[str, Tensor]:
        return {f"z.{name}": z for name, z in self._z.items()} | {f"u.{name}": u for name, u in self._u.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if not any(name.startswith("z.") for name in state):  # the checkpoint is from after the end
            self._z, self._u = {}, {}
        for name, z in self._z.items():
            z.copy_(state[f"z.{name}"])
            self._u[name].copy_(state[f"u.{name}"])

    def _project(self, grow: bool) -> None:
        """The new z, and then u; u stays zero with the first z."""
        for name, dropped in self._targets.select(self._scores()).items():
            weight, u = own(self._masks.weights[name]), self._u[name]
            z = self._z[name] = (weight + u).masked_fill_(dropped, 0.0)
            if grow:
                u += weight - z

    def _scores(self) -> dict[str, Tensor]:
        scores = {}
        for name, weight in self._masks.weights.items():
            score = (own(weight) + self._u[name]).abs_()
            if self._score == "taylor":
                score *= own(self._optimizer.state[weight]["exp_avg_sq"]).sqrt()
            scores[name] = score
        return scores
