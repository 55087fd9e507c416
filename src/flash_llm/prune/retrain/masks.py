"""The zeros of a model, and how they are held while it is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Masks:
    """Which weights are dropped. Dropped weights stay so: what is kept only gets less.

    Args:
        weights: the pruned layers' weights, by name; those that are zero are dropped.

    Attributes:
        weights: as given.
        dropped: bool, of the weights' shapes.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self.dropped = {name: weight.detach() == 0 for name, weight in self.weights.items()}

    def zeros(self, name: str) -> int:
        """Number of dropped weights of a layer."""
        return int(self.dropped[name].sum())

    def drop(self, name: str, more: Tensor) -> None:
        """Drop more weights of a layer."""
        self.dropped[name] |= more
        self.weights[name].data.masked_fill_(self.dropped[name], 0.0)

    @torch.no_grad()
    def hold_gradients(self) -> None:
        """Set the gradients of dropped weights to zero."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(self.dropped[name], 0.0)

    @torch.no_grad()
    def hold_weights(self) -> None:
        """Set dropped weights to zero, whatever the optimizer did to them."""
        for name, weight in self.weights.items():
            weight.masked_fill_(self.dropped[name], 0.0)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep."""
        return {f"dropped.{name}": dropped for name, dropped in self.dropped.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up :meth:`state`."""
        for name, dropped in self.dropped.items():
            dropped.copy_(state[f"dropped.{name}"])
