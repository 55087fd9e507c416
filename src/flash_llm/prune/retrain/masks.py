"""The zeros of a model, and how they are held while it is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flash_llm.prune.retrain.processes import ALONE, Processes, own, part_like, whole


class Masks:
    """Which weights are dropped. Dropped weights stay so: what is kept only gets less.

    Args:
        weights: the pruned layers' weights, by name; those that are zero are dropped.
        processes: that the weights are shared out to.

    Attributes:
        weights: as given.
        dropped: bool, of the shapes of this process's parts of the weights.
        processes: as given.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], processes: Processes = ALONE) -> None:
        self.weights, self.processes = dict(weights), processes
        self.dropped = {name: own(weight.detach()) == 0 for name, weight in self.weights.items()}

    def zeros(self, *names: str) -> int:
        """Number of dropped weights of some layers together."""
        if not names:
            return 0
        return self.processes.sum(int(torch.stack([self.dropped[name].sum() for name in names]).sum()))

    def count(self, *names: str) -> int:
        """Number of weights of some layers together, dropped or not."""
        return sum(self.weights[name].numel() for name in names)

    def whole(self, name: str) -> Tensor:
        """A layer's mask, whole: bool, of the weight's shape."""
        return whole(part_like(self.dropped[name], self.weights[name]))

    def drop(self, name: str, more: Tensor) -> None:
        """Drop more weights of a layer."""
        self.dropped[name] |= more
        own(self.weights[name].data).masked_fill_(self.dropped[name], 0.0)

    @torch.no_grad()
    def hold_gradients(self) -> None:
        """Set the gradients of dropped weights to zero."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                own(weight.grad).masked_fill_(self.dropped[name], 0.0)

    @torch.no_grad()
    def hold_weights(self) -> None:
        """Set dropped weights to zero, whatever the optimizer did to them."""
        for name, weight in self.weights.items():
            own(weight).masked_fill_(self.dropped[name], 0.0)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must keep."""
        return {f"dropped.{name}": dropped for name, dropped in self.dropped.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up :meth:`state`."""
        for name, dropped in self.dropped.items():
            dropped.copy_(state[f"dropped.{name}"])
