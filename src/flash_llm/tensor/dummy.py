"""Random packed weights made without a dense matrix: for measuring models whose weights nobody has."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flash_llm.tensor import pack as _pack
from flash_llm.tensor.layout import LANES, STRIP_ROWS, VALUE_DTYPES, ValueKind, grid
from flash_llm.tensor.packed import PackedWeight

_DIGITS = 12
_RANGE = 1e-3


def random_packed(
    rows: int,
    columns: int,
    sparsity: float,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    values: str | ValueKind = ValueKind.BITS16,
) -> PackedWeight:
    """A [rows, columns] weight with that share of zeros at random places, and values in +-0.001.

    Made in the packed form: memory stays near the result's own, and a matrix of OPT-175B takes milliseconds on a GPU.
    The share of zeros is met but for chance and rounding to 1/4096. Unlike in a weight that was packed, what fills up
    packets is random too; readers ignore it.

    Args:
        generator: of ``device``; None takes torch's own.
        values: "16-bit", "float8_e4m3" or "int8".

    Raises:
        ValueError: a size below 1, a sparsity that is not from 0 up to, not including, 1, or unknown ``values``.
        TypeError: a dtype that weights can't be packed in.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"{rows} x {columns}: a weight has at least one row and one column")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity}: it takes a number from 0 up to, not including, 1")
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"weights of {dtype} can't be packed; take float16 or bfloat16")
    device = torch.device(device)
    strips, words, _ = grid(rows, columns, 1)
    bitmap = _random_bits((strips, words, LANES), 1 - sparsity, device, generator)
    kind = ValueKind(values)
    _clear_margins(bitmap, rows, columns, kind)
    counts = _pack.word_counts(bitmap)
    tile_words = _pack.choose_tile_words(counts, kind)
    packets = _pack._packets(_pack.tile_counts(counts, tile_words), kind.packet_values)
    offsets = _pack.packet_offsets(packets.sum(-1).flatten(), rows, columns)
    numbers = _random_values(int(offsets[-1]) * kind.packet_values, kind, dtype, device, generator)
    weight = PackedWeight((rows, columns), bitmap, numbers, offsets, tile_words, int(packets.max()))
    if kind is ValueKind.BITS16:
        return weight
    scales = torch.full((rows,), _RANGE / kind.largest, dtype=torch.float32, device=device)
    return replace(weight, scales=scales, computed_in=dtype)


def _random_values(
    count: int, kind: ValueKind, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    if kind is ValueKind.BITS16:
        return torch.empty(count, dtype=dtype, device=device).uniform_(-_RANGE, _RANGE, generator=generator)
    if kind is ValueKind.INT8:
        return torch.randint(-127, 128, (count,), dtype=torch.int8, device=device, generator=generator)
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device, generator=generator)
    bits[bits & 0x7F == 0x7F] -= 1  # no NaN
    return bits.view(torch.float8_e4m3fn)


def _random_bits(
    shape: tuple[int, ...], share: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """int32 words whose bits are 1 with probability ``share``.

    Digit by digit of the share in base 2, from the last: OR with random bits halves the way to 1, AND the way to 0.
    """
    digits = min(max(round(share * 2**_DIGITS), 1), 2**_DIGITS)
    if digits == 2**_DIGITS:
        return torch.full(shape, -1, dtype=torch.int32, device=device)
    words = torch.zeros(shape, dtype=torch.int32, device=device)
    for digit in range(_DIGITS):
        random = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)
        words = words | random if digits >> digit & 1 else words & random
    return words


def _clear_margins(bitmap: Tensor, rows: int, columns: int, kind: ValueKind) -> None:
    """Clears, in place, bits below the last row and right of the last column, with the bitmaps of matrices of ones."""
    wide = torch.ones(STRIP_ROWS, columns, dtype=torch.float16, device=bitmap.device)
    bitmap &= PackedWeight.from_dense(wide, values=kind).bitmap
    if rows % STRIP_ROWS:
        bitmap[-1:] &= PackedWeight.from_dense(wide[: rows % STRIP_ROWS], values=kind).bitmap
