"""8-bit values with a scale for each row: rounding to them, back, and choosing the scales.

A weight w of row m is stored as the 8-bit number q nearest to w / scale[m], and read as q * scale[m]. Everything goes
by chunks of rows, so that memory stays near the matrix's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_llm.tensor.layout import ValueKind

SCALES = "scales.safetensors"
"""File beside a dense model whose weights are rounded already: the scales of each, by the weight's name."""

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}

# Scales that are tried, relative to the one with which the row's largest weight just fits. Whole steps of int8 are the
# finer the more is clipped. A float8's are relative to the value: there clipping gains little, and it counts where in
# its binade a row's weights fall, hence more than one octave.
_TRIED = {
    ValueKind.INT8: [1 - 0.025 * i for i in range(21)],
    ValueKind.E4M3: [1.0, *(2 ** (i / 12) for i in range(-12, 10) if i)],
}


def choose_scales(weight: Tensor, kind: ValueKind) -> Tensor:
    """The scale of each row that makes the sum of squared rounding errors least, of some twenty that are tried.

    Never worse than the scale with which the row's largest weight just fits, which is the first one tried.

    Args:
        weight: finite, floating [M, K].
        kind: of 8 bits.

    Returns:
        float32 [M], all positive. Rows of zeros have 1.
    """
    found = [_choose(weight[rows].float(), kind) for rows in _chunks(weight)]
    return torch.cat(found)


def _choose(weight: Tensor, kind: ValueKind) -> Tensor:
    largest = weight.abs().amax(dim=1)
    fitting = torch.where(largest > 0, largest / kind.largest, 1.0)
    best, least = fitting, torch.full_like(fitting, torch.inf)
    for factor in _TRIED[kind]:
        scales = fitting * factor
        error = (rounded(weight, scales, kind) - weight).square().sum(dim=1)
        better = (error < least) & (scales > 0) & (largest > 0)
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def rounded(weight: Tensor, scales: Tensor, kind: ValueKind) -> Tensor:
    """``weight [M, K]``, float32, as it reads once it is stored: in float32."""
    return _numbers(weight, scales, kind) * scales[:, None]


def quantise(weight: Tensor, scales: Tensor, kind: ValueKind) -> Tensor:
    """The bytes of the 8-bit values of a floating ``weight [M, K]``: uint8 [M, K]. Both zeros are 0."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in _chunks(weight):
        numbers = _numbers(weight[rows].float(), scales[rows], kind) + 0.0  # -0.0 + 0.0 is 0.0
        codes[rows] = numbers.to(kind.dtype).view(torch.uint8)
    return codes


def dequantise(codes: Tensor, scales: Tensor, kind: ValueKind, dtype: torch.dtype) -> Tensor:
    """What :func:`quantise` stored, [M, K] in ``dtype``: the product with the scale, in float32, is rounded once."""
    assert kind.dtype is not None
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in _chunks(codes):
        result[rows] = (codes[rows].view(kind.dtype).float() * scales[rows, None]).to(dtype)
    return result


def is_rounded(weight: Tensor, scales: Tensor, kind: ValueKind) -> bool:
    """Whether ``weight [M, K]`` is made of 8-bit values and these scales, but for having been cast to 16 bits since."""
    if scales.dtype != torch.float32 or scales.shape != weight.shape[:1]:
        return False
    if not bool((scales.isfinite() & (scales > 0)).all()):
        return False
    # A little more than half of bfloat16's last bit, and of float16's smallest number.
    relative, absolute = 0.55 * torch.finfo(torch.bfloat16).eps, 0.55 * 2**-24
    for rows in _chunks(weight):
        wide = weight[rows].float()
        if not torch.allclose(rounded(wide, scales[rows], kind), wide, rtol=relative, atol=absolute):
            return False
    return True


def _numbers(weight: Tensor, scales: Tensor, kind: ValueKind) -> Tensor:
    """The 8-bit numbers nearest to ``weight / scales``, ties to even, as float32. What is too large is clipped."""
    numbers = (weight / scales[:, None]).clamp_(-kind.largest, kind.largest)
    return numbers.round_() if kind is ValueKind.INT8 else numbers.to(torch.float8_e4m3fn).float()


def _chunks(matrix: Tensor) -> Iterator[slice]:
    """Ranges of rows that are worked on at a time."""
    rows, columns = matrix.shape
    step = max(1, _CHUNK_ELEMENTS.get(matrix.device.type, 1 << 22) // max(columns, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
