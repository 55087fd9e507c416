"""Packing one element at a time, from nothing but the layout's two functions: what the fast packing is held against."""

from __future__ import annotations

from torch import Tensor

from flash_llm.tensor.layout import LANES, WORD_BITS, ValueKind, bit_position, element_coordinates
from sparse_matrices import bits

Value = int
"""A stored value's own bits."""


def slow_pack(
    dense: Tensor, tile_words: int, stored: Tensor | None = None
) -> tuple[list[list[list[int]]], list[Value], list[int]]:
    """(bitmap [strips][words][32] of unsigned words, values, offsets).

    ``stored``: the bytes of 8-bit values, uint8 of dense's shape; None: dense's own 16 bits are stored.
    """
    matrix = bits(dense).tolist()
    numbers = matrix if stored is None else stored.tolist()
    kind = ValueKind.BITS16 if stored is None else ValueKind.INT8  # all 8-bit ones are laid out alike
    rows, columns = len(matrix), len(matrix[0])
    strips, words = -(-rows // 16), -(-columns // 64)
    bitmap = [[[0] * LANES for _ in range(words)] for _ in range(strips)]
    values: list[Value] = []
    offsets = [0]
    for strip in range(strips):
        for first in range(0, words, tile_words):
            lanes: list[list[Value]] = [[] for _ in range(LANES)]
            for word in range(first, min(first + tile_words, words)):
                for lane in range(LANES):
                    for element in range(WORD_BITS):
                        row, column = element_coordinates(lane, element, kind)
                        row, column = 16 * strip + row, 64 * word + column
                        if row < rows and column < columns and matrix[row][column] & 0x7FFF:
                            bitmap[strip][word][lane] |= 1 << bit_position(element, kind)
                            lanes[lane].append(numbers[row][column])
            values += in_packets(lanes, kind.packet_values)
            offsets.append(len(values) // kind.packet_values)
    return bitmap, values, offsets


def in_packets(lanes: list[list[Value]], per_packet: int) -> list[Value]:
    """A tile's values: all lanes' first packets, then the second packets of the lanes that have one, and so on."""
    stored: list[Value] = []
    for start in range(0, max(map(len, lanes)), per_packet):
        for mine in lanes:
            packet = mine[start : start + per_packet]
            if packet:
                stored += packet + [0] * (per_packet - len(packet))
    return stored
