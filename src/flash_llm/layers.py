"""What is a linear layer, and which way round it keeps its weight."""

from __future__ import annotations

from torch import Tensor, nn

_SAME_PRODUCT = ("FalconLinear",)
"""Classes whose forward differs from ``nn.Linear``'s in rounding alone."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of any kind."""
    return isinstance(module, nn.Linear) or is_turned(module)


def is_packable(module: nn.Module) -> bool:
    """Whether a module is a linear layer and no more, so that :class:`flash_llm.nn.SparseLinear` can take its place.

    Subclasses are not, even with ``nn.Linear``'s own forward: ``nn.MultiheadAttention`` takes the weight out of its
    output layer, of such a class, and multiplies by itself. Falcon's is one, which only spells its product out.
    """
    plain = type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ in _SAME_PRODUCT)
    return plain or is_turned(module)


def is_turned(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, GPT-2's linear layer, whose weight is [inputs, outputs].

    By its name: importing transformers takes seconds.
    """
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def oriented(weight: Tensor, turned: bool) -> Tensor:
    """[outputs, inputs] of a weight that is the other way round if ``turned``; and back."""
    return weight.t().contiguous() if turned else weight


def matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A linear layer's weight as [outputs, inputs]; or that of a tensor that is stored as its weight is, and back."""
    return oriented(module.get_parameter("weight") if weight is None else weight, is_turned(module))


def bias_of(module: nn.Module) -> Tensor | None:
    """A linear layer's bias, if it has one."""
    return module.bias.detach() if isinstance(module.bias, Tensor) else None


def sizes(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    first, second = module.get_parameter("weight").shape
    return (second, first) if is_turned(module) else (first, second)
