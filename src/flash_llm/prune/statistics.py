"""What is known of a layer's inputs after the calibration data has passed through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Need = Literal["none", "norm", "hessian"]


class Statistics(Protocol):
    """A running statistic of inputs ``[tokens, K]``.

    It is split in two, since layers that read the same tensor (query, key and value) share the costly half. Layers that
    have always read the same tensors share the whole statistic.
    """

    tokens: int

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        """What one batch of inputs ``[tokens, K]`` contributes."""
        ...

    def add(self, measured: Tensor, tokens: int) -> None:
        """Add a batch's contribution."""
        ...

    def copy(self) -> Statistics:
        """One that goes its own way from here on."""
        ...

    def is_finite(self) -> bool:
        """Whether all inputs were finite numbers."""
        ...


class _Sum:
    """A statistic that is a sum over batches."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, measured: Tensor, tokens: int) -> None:
        self._sum = measured.clone() if self._sum is None else self._sum.add_(measured)
        self.tokens += tokens

    def copy(self) -> Self:
        other = type(self)()
        other.tokens, other._sum = self.tokens, None if self._sum is None else self._sum.clone()
        return other

    @property
    def _seen(self) -> Tensor:
        if self._sum is None:
            raise ValueError("No input was seen.")
        return self._sum


class InputNorm(_Sum):
    """The Euclidean norm of each input feature over all tokens, ``||X_j||_2``.

    Squares are summed in float32 within a batch and in float64 over batches.
    """

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        return x.float().square().sum(dim=0).double()

    def is_finite(self) -> bool:
        return self._sum is None or bool(self._sum.isfinite().all())

    @property
    def norm(self) -> Tensor:
        """float32 ``[K]``."""
        return self._seen.sqrt().float()


class Hessian(_Sum):
    """``X^T X`` of the inputs X, summed in float32 on their device: half the Hessian of a layer's squared error."""

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        x = x.float()
        return x.T @ x

    def is_finite(self) -> bool:
        # A NaN or an infinite input is squared into its own place on the diagonal.
        return self._sum is None or bool(self._sum.diagonal().isfinite().all())

    @property
    def matrix(self) -> Tensor:
        """float32 ``[K, K]``; not to be changed, since layers may share it."""
        return self._seen


STATISTICS: Mapping[str, Callable[[], Statistics]] = {"norm": InputNorm, "hessian": Hessian}


class Collector:
    """Collects a statistic of each layer's inputs while it is entered as a context.

    Args:
        layers: linear layers by name.
        need: which statistic, a key of ``STATISTICS``.
    """

    def __init__(self, layers: Mapping[str, nn.Module], need: str) -> None:
        self._layers = layers
        self._names = list(layers)
        # Layers with the same past share a statistic: a Hessian may take gigabytes. They part when their inputs do.
        self._groups: list[tuple[set[str], Statistics]] = [(set(layers), STATISTICS[need]())]
        self._handles: list[Any] = []
        # The last tensor measured, and who has read it. Holding it keeps its identity from being taken over by another.
        self._input: Tensor | None = None
        self._measured: Tensor | None = None
        self._readers: set[str] = set()

    @property
    def statistics(self) -> dict[str, Statistics]:
        """By the layers' names. ``tokens`` is 0 for a layer that was never called."""
        self._settle()
        return {name: next(found for names, found in self._groups if name in names) for name in self._names}

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
        self._settle()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            if x.numel() == 0:
                return
            if x is not self._input or name in self._readers:
                self._settle()
                with torch.no_grad():
                    # At once, not when it is settled: the model may change the tensor after this layer.
                    self._input, self._measured = x, self._groups[0][1].measure(x.reshape(-1, x.shape[-1]))
            self._readers.add(name)

        return hook

    def _settle(self) -> None:
        """Add what was measured last to the statistics of all layers that have read it."""
        if self._input is None or self._measured is None:
            return
        tokens = self._input.numel() // self._input.shape[-1]
        for names, statistic in list(self._groups):
            readers = names & self._readers
            if not readers:
                continue
            if readers != names:
                names -= readers
                statistic = statistic.copy()
                self._groups.append((readers, statistic))
            statistic.add(self._measured, tokens)
        self._input = self._measured = None
        self._readers = set()
