"""Bytes of a weight matrix in every format that a plan compares, from its shape and share of zeros alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flash_llm.checkpoint import WORTH
from flash_llm.tensor.layout import (
    CHOSEN_TILE_WORDS,
    LANE_CAPACITY,
    LANES,
    MAX_PADDING,
    PACKET_BYTES,
    STRIP_ROWS,
    WORD_BITS,
    ValueKind,
    grid,
)
from flash_llm.tensor.pack import busiest_work, lane_counts, tile_counts

INT4_GROUP = 128
_VALUES = {"fp8": ValueKind.E4M3, "int8": ValueKind.INT8, "8bit": ValueKind.E4M3}


@dataclass(frozen=True)
class Format:
    """How the linear layers of a model are stored and multiplied.

    Attributes:
        kind: "dense" (16 bits), "fp8", "int4" (a 16-bit scale for each 128 weights of a row) or "sparse".
        sparsity: share of zeros, for "sparse".
        values: how nonzeros are stored, for "sparse".
    """

    kind: str
    sparsity: float = 0.0
    values: ValueKind = ValueKind.BITS16

    @property
    def name(self) -> str:
        """What tables call it."""
        names = {"dense": "dense 16-bit", "fp8": "FP8", "int4": f"INT4, group {INT4_GROUP}"}
        of_8_bits = "" if self.values is ValueKind.BITS16 else " + 8 bit"
        return names.get(self.kind, f"sparse {round(100 * self.sparsity, 4):g}%{of_8_bits}")

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] weight."""
        if self.kind == "dense":
            return 2 * rows * columns
        if self.kind == "fp8":
            return rows * columns
        if self.kind == "int4":
            return rows * columns // 2 + 2 * rows * math.ceil(columns / INT4_GROUP)
        return compressed_nbytes(rows, columns, self.sparsity, self.values)


def formats(sparse: Sequence[float | str]) -> list[Format]:
    """What a plan compares: dense, FP8, INT4, and sparse ones, each as :func:`sparse_format` takes it.

    Raises:
        ValueError: as there.
    """
    return [Format("dense"), Format("fp8"), Format("int4"), *dict.fromkeys(sparse_format(str(text)) for text in sparse)]


def sparse_format(text: str) -> Format:
    """A sparse format from "0.6", or "0.6+fp8", "0.6+int8" or "0.6+8bit" with nonzeros of 8 bits.

    Raises:
        ValueError: it is none of these.
    """
    share, plus, values = text.strip().partition("+")
    try:
        sparsity = check(float(share))
        kind = _VALUES[values] if plus else ValueKind.BITS16
    except (ValueError, KeyError):
        raise ValueError(
            f"sparsity {text!r}: it takes a number from 0 up to, not including, 1; for nonzeros of 8 bits with "
            f"{' or '.join('+' + word for word in _VALUES)} behind it, as in 0.6+fp8"
        ) from None
    return Format("sparse", sparsity, kind)


def check(sparsity: float) -> float:
    """The share of zeros, if it is one.

    Raises:
        ValueError: it is not from 0 up to, not including, 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}: it takes a share of zeros from 0 up to, not including, 1, such as 0.6")
    return sparsity


def compressed_nbytes(rows: int, columns: int, sparsity: float, values: ValueKind = ValueKind.BITS16) -> int:
    """Bytes of a layer in a compressed checkpoint, where those that would hardly shrink stay dense."""
    dense = 2 * rows * columns
    packed = packed_nbytes(rows, columns, sparsity, values)
    return packed if packed <= WORTH * dense else dense


@functools.lru_cache(maxsize=4096)
def packed_nbytes(rows: int, columns: int, sparsity: float, values: ValueKind = ValueKind.BITS16) -> int:
    """Expected bytes of a packed [rows, columns] matrix whose zeros are anywhere with the same probability.

    Real pruned weights differ little: padding fills each lane's nonzeros of a tile to whole packets, and of a lane with
    many nonzeros that is half a packet on average whatever their distribution.

    Raises:
        ValueError: a size below 1, or a share of zeros that is none.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"a matrix of {rows} x {columns}: it needs at least one row and one column")
    tile_words = expected_tile_words(rows, columns, check(sparsity), values)
    strips, words, tiles = grid(rows, columns, tile_words)
    packets = _packets(rows, columns, 1 - sparsity, tile_words, values.packet_values)
    scales = 0 if values is ValueKind.BITS16 else 4 * rows
    return round(PACKET_BYTES * packets) + 4 * strips * words * LANES + 4 * (strips * tiles + 1) + scales


def expected_tile_words(rows: int, columns: int, sparsity: float, values: ValueKind = ValueKind.BITS16) -> int:
    """What ``tensor.pack.choose_tile_words`` is expected to choose: the same rule, with expected counts."""
    density = 1 - sparsity
    strips, words, _ = grid(rows, columns, 1)
    nonzeros = rows * columns * density
    wanted = MAX_PADDING * (values.nbytes * nonzeros + strips * words * LANES * 4)
    best: tuple[bool, float, int] | None = None
    for tile_words in sorted(CHOSEN_TILE_WORDS, reverse=True):
        if tile_words > 2 * words:
            continue
        tiles = grid(rows, columns, tile_words)[2]
        fullest = min(tile_words, words) * WORD_BITS
        if strips * tiles * LANES * _overflow(fullest, density) > 0.5:  # one lane too full is likelier than none
            continue
        packets = _packets(rows, columns, density, tile_words, values.packet_values)
        padded = values.nbytes * (values.packet_values * packets - nonzeros) > wanted
        if padded and best is not None:
            break
        work = busiest_work(strips, tiles, tile_words, int(packets), values)
        if best is None or (padded, work) < best[:2]:
            best = (padded, work, tile_words)
    return best[2] if best else min(CHOSEN_TILE_WORDS)


def _packets(rows: int, columns: int, density: float, tile_words: int, per_packet: int) -> float:
    """Expected packets of a matrix."""
    full, rest = divmod(rows, STRIP_ROWS)
    strips = [(STRIP_ROWS, full)] * (full > 0) + [(rest, 1)] * (rest > 0)
    return sum(
        number
        * sum(
            lanes * _lane_packets(places, density, per_packet) for places, lanes in _places(height, columns, tile_words)
        )
        for height, number in strips
    )


@functools.lru_cache(maxsize=1024)
def _places(height: int, columns: int, tile_words: int) -> tuple[tuple[int, int], ...]:
    """(elements that a lane has in a tile, lanes of that kind) in a strip of ``height`` rows."""
    ones = torch.ones(height, columns, dtype=torch.int16)
    places, lanes = tile_counts(lane_counts(ones), tile_words).unique(return_counts=True)
    return tuple(zip(places.tolist(), lanes.tolist(), strict=True))


@functools.lru_cache(maxsize=4096)
def _lane_packets(places: int, density: float, per_packet: int) -> float:
    """Expected packets of a lane: the sum over j of P(more than j packets' nonzeros)."""
    return float(sum(_tail(places, density, per_packet * j) for j in range(math.ceil(places / per_packet))))


def _overflow(places: int, density: float) -> float:
    return _tail(places, density, LANE_CAPACITY)


@functools.lru_cache(maxsize=65536)
def _tail(places: int, density: float, count: int) -> float:
    """P(more than ``count`` of ``places`` are nonzero)."""
    if count >= places:
        return 0.0
    if density >= 1:
        return 1.0
    k = torch.arange(count + 1, places + 1, dtype=torch.float64)
    n = torch.tensor(float(places), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float((ways + k * math.log(density) + (n - k) * math.log1p(-density)).exp().sum())
