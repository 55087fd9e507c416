"""The packed format, written down once. Everything that packs, unpacks or multiplies takes its numbers from here.

A matrix of M rows and K columns is cut into *strips* of 16 rows, a strip into *words* of 64 columns and into *tiles* of
``tile_words`` consecutive words. A warp of 32 lanes works on one tile at a time, and every lane owns the elements that
the tensor cores' ``m16n8k16`` A operand (and each warp's share of ``wgmma``'s) wants in that lane's registers. So
nothing is ever exchanged between lanes. ``docs/format.md`` has the same in prose, with an example.
"""

from __future__ import annotations

from enum import Enum

import torch

FORMAT_VERSION = 3
"""The newest that is read; what is written is ``ValueKind.format_version``, the oldest that can say it."""

RETIRED_VERSIONS = (2,)
"""Versions that no release wrote and none reads: the first form of 8-bit values, with elements in another order."""

STRIP_ROWS = 16
"""Rows of a strip: the M of the tensor cores' instruction for one warp."""

WORD_COLUMNS = 64
"""Columns that one row of 32 bitmap words covers: four K steps of 16."""

LANES = 32

WORD_BITS = STRIP_ROWS * WORD_COLUMNS // LANES
"""Elements that a lane owns in a word, one bit each."""

PACKET_BYTES = 16
"""Bytes of a packet, the unit that a lane loads at a time."""

PACKET_VALUES = 8
"""Values of 16 bits in a packet; ``ValueKind.packet_values`` has it for all kinds."""

LANE_CAPACITY = 96
"""Nonzeros that a lane may have in a tile. Kernels expand a tile in shared memory, 128 bytes a nonzero and warp, so
this bounds what a warp needs; 96 lets 12 to 16 warps and a piece of X live together on one multiprocessor."""

MAX_PADDING = 0.075
"""How much larger than its nonzeros and 1 bit an element a matrix may become for the sake of smaller tiles."""

TILE_WORDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
"""Tile sizes that kernels are built for. With one or two words a lane can't exceed LANE_CAPACITY at any sparsity."""

CHOSEN_TILE_WORDS = tuple(size for size in TILE_WORDS if size == 1 or size % 2 == 0)
"""Tile sizes that matrices are packed with: after an odd number of words ``wgmma`` waits, see ``spmm_sm90.cu``."""


VALUE_DTYPES = (torch.float16, torch.bfloat16)
"""What a packed weight is a matrix of, and so what x is of."""


class ValueKind(Enum):
    """How nonzeros are stored: as they are, or in 8 bits with a float32 scale for each row of the matrix."""

    BITS16 = "16-bit"
    E4M3 = "float8_e4m3"
    INT8 = "int8"

    @classmethod
    def _missing_(cls, value: object) -> ValueKind:
        if value == "fp8":
            return cls.E4M3
        known = ", ".join(repr(kind.value) for kind in cls)
        raise ValueError(f"values={value!r}: it takes one of {known}")

    @classmethod
    def of(cls, dtype: torch.dtype) -> ValueKind | None:
        """The kind whose values have that dtype in memory; None if there is none."""
        return cls.BITS16 if dtype in VALUE_DTYPES else _KINDS.get(dtype)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the values in memory; None for 16 bits, which is of the matrix's own."""
        return next((dtype for dtype, kind in _KINDS.items() if kind is self), None)

    @property
    def code(self) -> int:
        """0, 1 or 2: in checksums, and what kernels are compiled with."""
        return list(ValueKind).index(self)

    @property
    def nbytes(self) -> int:
        """Bytes of a value."""
        return 2 if self is ValueKind.BITS16 else 1

    @property
    def packet_values(self) -> int:
        """Values in a packet."""
        return PACKET_BYTES // self.nbytes

    @property
    def largest(self) -> float:
        """The largest value that 8 bits hold, before it is multiplied by the scale."""
        return {ValueKind.E4M3: 448.0, ValueKind.INT8: 127.0}[self]

    @property
    def format_version(self) -> int:
        """That weights of this kind are written in: readers of version 1 know 16-bit values alone."""
        return 1 if self is ValueKind.BITS16 else 3


_KINDS = {torch.float8_e4m3fn: ValueKind.E4M3, torch.int8: ValueKind.INT8}


def bit_position(element: int, kind: ValueKind = ValueKind.BITS16) -> int:
    """Where the bit of a lane's ``element`` (0 to 31) stands in its bitmap word.

    Elements are dealt to the four bytes in turn. 16-bit values: from each byte's top bit down, and all are moved on by
    one place (element 31 wraps to the front). A shift by s then brings elements 4s-1 to 4s+2 to the four bytes' top
    bits, where one ``dp4a`` counts them and one ``prmt`` spreads them into masks. 8-bit values: from each byte's lowest
    bit up, so that elements 4s to 4s+3, which are one register, are bits s of the four bytes. See
    ``kernels/csrc/decode.cuh``.
    """
    if kind is not ValueKind.BITS16:
        return 8 * (element % 4) + element // 4
    place = (element + 1) % WORD_BITS
    return 8 * (place % 4) + 7 - place // 4


def element_coordinates(lane: int, element: int, kind: ValueKind = ValueKind.BITS16) -> tuple[int, int]:
    """(row in the strip, column in the word) of a lane's element.

    Lane ``4 g + t`` owns rows g and g + 8. Its elements run through the word's four K steps of 16 columns; in a step
    come columns 2t, 2t+1 of row g, the same of row g + 8, then columns 2t+8, 2t+9 of both rows. With 8-bit values all
    four columns of row g come first, then those of row g + 8: four values are a register there.
    """
    group, thread = divmod(lane, 4)
    step, rest = divmod(element, 8)
    first, rest = divmod(rest, 4)
    second, column = divmod(rest, 2)
    row_half, column_half = (second, first) if kind is ValueKind.BITS16 else (first, second)
    return group + 8 * row_half, 16 * step + 8 * column_half + 2 * thread + column


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def grid(rows: int, columns: int, tile_words: int) -> tuple[int, int, int]:
    """(strips, words a strip, tiles a strip) of a matrix."""
    words = ceil_div(columns, WORD_COLUMNS)
    return ceil_div(rows, STRIP_ROWS), words, ceil_div(words, tile_words)
