"""Adapters of low rank that respect the mask, so that merging them keeps every zero (PERP, arXiv 2312.15230)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flash_llm.prune.retrain.masks import Masks


class MaskedAdapter(nn.Module):
    """``W + B A`` where W is kept, zero where it is dropped.

    Args:
        weight: W, ``[R, C]``.
        dropped: bool ``[R, C]``.
        rank: rows of A ``[rank, C]`` and columns of B ``[R, rank]``. B begins as zeros: nothing changes at first.
        generator: of A's first values, on the CPU.
    """

    dropped: Tensor

    def __init__(self, weight: Tensor, dropped: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        first = torch.randn(rank, columns, generator=generator) * columns**-0.5
        self.a = nn.Parameter(first.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.register_buffer("dropped", dropped, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        # In float32, so that what is merged is what was trained.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.b @ self.a).masked_fill(self.dropped, 0.0)


def add_adapters(model: nn.Module, masks: Masks, rank: int, train_norms: bool, seed: int) -> None:
    """Freeze a model but for adapters at the layers of ``masks``, and norms and biases if wanted.

    Raises:
        ValueError: a rank that is no less than a layer's size.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(train_norms and parameter.dim() == 1)
    for name, weight in masks.weights.items():
        if rank >= min(weight.shape):
            raise ValueError(f"lora_rank={rank} must be less than the sizes of {name}, {list(weight.shape)}.")
        owner, _, leaf = name.rpartition(".")
        adapter = MaskedAdapter(weight.detach(), masks.dropped[name], rank, generator)
        parametrize.register_parametrization(model.get_submodule(owner), leaf, adapter)


def merge_adapters(model: nn.Module, masks: Masks) -> None:
    """Turn adapters into weights, which keep their names and their zeros."""
    for name in masks.weights:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
        masks.weights[name] = getattr(module, leaf)
    masks.hold_weights()
