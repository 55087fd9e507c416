"""Random sparse matrices for all tests: of any shape, sparsity and pattern, and of any 16 bits."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
PATTERNS = ("even", "rows", "columns", "one tile")


def sparse(
    rows: int,
    columns: int,
    sparsity: float,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    pattern: str = "even",
    device: str = "cpu",
) -> Tensor:
    """A normal [rows, columns] matrix with about ``sparsity`` zeros.

    Args:
        pattern: where the nonzeros are: everywhere alike; every fourth row dense and the others sparser; the same by
            columns; or all in the first 16 x 512 elements.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, device=device)
    keep = torch.rand(rows, columns, generator=generator, device=device) >= sparsity
    if pattern == "rows":
        keep[::4] = True
    elif pattern == "columns":
        keep[:, ::4] = True
    elif pattern == "one tile":
        keep[:16, :512] = True
        keep[16:] = False
        keep[:, 512:] = False
    return torch.where(keep, weight, 0.0).to(dtype)


def any_bits(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int) -> Tensor:
    """A matrix whose nonzeros are any 16 bits: subnormals, infinities, NaN with payloads, and -0.0."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, generator=generator)
    special = torch.tensor([0x0001, 0x7C00, 0x7C01, 0x7E5A, 0x7F80, 0x7F81, -0x8000, -0x0400, -1], dtype=torch.int16)
    picked = special[torch.randint(0, len(special), (rows, columns), generator=generator)]
    bits = torch.where(torch.rand(rows, columns, generator=generator) < 0.3, picked, bits)
    keep = torch.rand(rows, columns, generator=generator) >= sparsity
    return torch.where(keep, bits, 0).to(torch.int16).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's own 16 bits an element, which compare where NaN doesn't."""
    return tensor.contiguous().view(torch.int16)


def without_negative_zero(tensor: Tensor) -> Tensor:
    """-0.0 as +0.0, which is all that packing may change."""
    return torch.where(bits(tensor) == -0x8000, 0, bits(tensor)).to(torch.int16).view(tensor.dtype)


@st.composite
def matrices(draw: st.DrawFn, max_rows: int = 70, max_columns: int = 1400) -> Tensor:
    """Matrices of any shape, sparsity, pattern and bits."""
    sizes = {"rows": max_rows, "columns": max_columns}
    edges = {"rows": [1, 15, 16, 17, 32, 33], "columns": [1, 2, 8, 63, 64, 65, 128, 129, 1024]}
    rows, columns = (draw(st.sampled_from(edges[k]) | st.integers(1, sizes[k])) for k in ("rows", "columns"))
    sparsity = draw(st.sampled_from([0.0, 0.5, 0.6, 0.7, 0.8, 0.99, 1.0]) | st.floats(0, 1))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    if draw(st.booleans()):
        return any_bits(rows, columns, sparsity, dtype, seed)
    return sparse(rows, columns, sparsity, dtype, seed, draw(st.sampled_from(PATTERNS)))
