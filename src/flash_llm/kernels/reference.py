"""The kernels' results on any device, slowly: in torch operations alone."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_llm.tensor import PackedWeight


def unpack(weight: PackedWeight) -> Tensor:
    """The dense [M, K] matrix."""
    return weight.to_dense()


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed weight, plus bias: [..., M] in x's dtype."""
    return torch.nn.functional.linear(x, unpack(weight), bias)
