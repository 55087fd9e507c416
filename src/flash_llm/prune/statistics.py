"""What is known of a layer's inputs after the calibration data has passed through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Need = Literal["none", "norm"]


class Statistics(Protocol):
    """A running statistic of inputs ``[tokens, K]``.

    It is split in two, since layers that read the same tensor (query, key and value) share the costly half.
    """

    tokens: int

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        """What one batch of inputs ``[tokens, K]`` contributes."""
        ...

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add a batch's contribution."""
        ...

    def is_finite(self) -> bool:
        """Whether all inputs were finite numbers."""
        ...


class InputNorm:
    """The Euclidean norm of each input feature over all tokens, ``||X_j||_2``.

    Squares are summed in float32 within a batch and in float64 over batches.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._squares: Tensor | None = None

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        return x.float().square().sum(dim=0).double()

    def add(self, measured: Tensor, tokens: int) -> None:
        self._squares = measured.clone() if self._squares is None else self._squares.add_(measured)
        self.tokens += tokens

    def is_finite(self) -> bool:
        return self._squares is None or bool(self._squares.isfinite().all())

    @property
    def norm(self) -> Tensor:
        """float32 ``[K]``."""
        if self._squares is None:
            raise ValueError("No input was seen.")
        return self._squares.sqrt().float()


# A method that needs more of the inputs (SparseGPT and ALPS: the Hessian X^T X) adds its class here.
STATISTICS: Mapping[str, Callable[[], Statistics]] = {"norm": InputNorm}


class Collector:
    """Collects a statistic of each layer's inputs while it is entered as a context.

    Args:
        layers: linear layers by name.
        need: which statistic, a key of ``STATISTICS``.

    Attributes:
        statistics: by the layers' names. ``tokens`` is 0 for a layer that was never called.
    """

    def __init__(self, layers: Mapping[str, nn.Module], need: str) -> None:
        self.statistics = {name: STATISTICS[need]() for name in layers}
        self._layers = layers
        self._handles: list[Any] = []
        # The last tensor measured. Holding it keeps its identity from being taken over by another tensor.
        self._input: Tensor | None = None
        self._measured: Tensor | None = None

    def __enter__(self) -> Collector:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._input = self._measured = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        statistic = self.statistics[name]

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            tokens = x.numel() // x.shape[-1]
            if tokens == 0:
                return
            if x is not self._input or self._measured is None:
                with torch.no_grad():
                    self._input, self._measured = x, statistic.measure(x.reshape(tokens, x.shape[-1]))
            statistic.add(self._measured, tokens)

        return hook
