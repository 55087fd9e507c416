"""What torch itself offers for a pruned weight, to stand beside ours.

A peer is built from a dense [M, K] weight with zeros and multiplies x [n, K] by its transpose. Any of them may refuse a
dtype, a shape or a GPU; the benchmark then notes the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Peer(Protocol):
    """A weight in some sparse form."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, K] W^T: [n, M]."""


class Csr:
    """Compressed rows, multiplied by cuSPARSE. Indices of 32 bits: half the bytes of those that torch makes."""

    def __init__(self, weight: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its sparse tensors a beta
            wide = weight.to_sparse_csr()
            parts = (wide.crow_indices().int(), wide.col_indices().int(), wide.values())
            self.matrix = torch.sparse_csr_tensor(*parts, size=weight.shape)
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return (self.matrix @ x.t()).t()


class TwoOfFourAndCsr:
    """SparTA's decomposition (Zheng et al., OSDI 2022): two of every four for the sparse tensor cores, the rest CSR."""

    def __init__(self, weight: Tensor) -> None:
        kept = two_of_four(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            self.kept = torch.sparse.to_sparse_semi_structured(kept)
        self.rest = Csr(weight - kept)
        # Half of the values, and two bits for each of them.
        self.nbytes = weight.nbytes // 2 + weight.numel() // 8 + self.rest.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.kept) + self.rest(x)


def two_of_four(weight: Tensor) -> Tensor:
    """The weight with the two largest magnitudes of every four neighbours in a row, the first ones among equals.

    Args:
        weight: [M, K].

    Raises:
        ValueError: K is no multiple of 4.
    """
    if weight.shape[1] % 4:
        raise ValueError(f"{weight.shape[1]} columns can't be taken by fours: two of four needs a multiple of 4")
    size = weight.abs().view(weight.shape[0], -1, 4)
    kept = torch.zeros_like(size, dtype=torch.bool)
    for i in range(4):
        ahead = torch.zeros(size.shape[:2], dtype=torch.int8, device=weight.device)
        for j in range(4):
            if j != i:
                ahead += size[..., j] >= size[..., i] if j < i else size[..., j] > size[..., i]
        kept[..., i] = ahead < 2
    return torch.where(kept.view_as(weight), weight, 0)


PEERS: dict[str, Callable[[Tensor], Peer]] = {"csr": Csr, "two_of_four_csr": TwoOfFourAndCsr}
"""How each is built, by its name in reports."""
