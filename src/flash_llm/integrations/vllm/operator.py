"""The operator that vLLM's compiled graphs hold.

vLLM compiles the pieces of a model between attention layers one by one, and compiles equal pieces once. Packed weights
of equal layers differ in how many values they have, so a graph that holds them is no other layer's. Hence
``flash_llm::linear_at`` takes of a weight only the bitmap, whose shape is that of the layer, and finds the rest by the
bitmap's address: all layers of one kind have one graph, and a model of 96 layers starts as fast as one of two.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from flash_llm import ops
from flash_llm.errors import KernelError
from flash_llm.tensor import PackedWeight

_weights: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()


def remember(weight: PackedWeight) -> PackedWeight:
    """Lets :func:`linear_at` find a weight as long as the caller keeps it, and its bitmap stays where it is."""
    _weights[weight.bitmap.data_ptr()] = weight
    return weight


def linear_at(x: Tensor, bias: Tensor | None, bitmap: Tensor, rows: int, relu: bool = False) -> Tensor:
    """``ops.linear(x, weight, bias, relu)`` with the weight of ``rows`` rows whose bitmap this is.

    Raises:
        KernelError: no weight that was given to :func:`remember` has its bitmap there.
    """
    return LINEAR_AT(x, bias, bitmap, rows, relu=relu)


torch.library.define(
    "flash_llm::linear_at", "(Tensor x, Tensor? bias, Tensor bitmap, int rows, *, bool relu=False) -> Tensor"
)
LINEAR_AT = torch.ops.flash_llm.linear_at.default


@torch.library.impl("flash_llm::linear_at", "CompositeExplicitAutograd")
def _linear_at(x: Tensor, bias: Tensor | None, bitmap: Tensor, rows: int, *, relu: bool = False) -> Tensor:
    weight = _weights.get(bitmap.data_ptr())
    if weight is None or weight.shape[0] != rows:
        raise KernelError(
            f"no packed weight of {rows} rows has its bitmap at {bitmap.data_ptr():#x}: the model's weights were moved "
            f"after loading, which packed layers can't be; leave CPU offloading off"
        )
    return ops.linear(x, weight, bias, relu)


@torch.library.register_fake("flash_llm::linear_at")
def _linear_at_fake(x: Tensor, bias: Tensor | None, bitmap: Tensor, rows: int, *, relu: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)
