"""Bytes of a weight matrix in every format that a plan compares, from its shape and share of zeros alone."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from flash_llm.checkpoint import WORTH
from flash_llm.tensor.layout import (
    CHOSEN_TILE_WORDS,
    LANE_CAPACITY,
    LANES,
    MAX_PADDING,
    PACKET_VALUES,
    STRIP_ROWS,
    WORD_BITS,
    grid,
)
from flash_llm.tensor.pack import busiest_work, lane_counts, tile_counts

INT4_GROUP = 128


@dataclass(frozen=True)
class Format:
    """How the linear layers of a model are stored and multiplied.

    Attributes:
        kind: "dense" (16 bits), "fp8", "int4" (a 16-bit scale for each 128 weights of a row) or "sparse".
        sparsity: share of zeros, for "sparse".
    """

    kind: str
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """What tables call it."""
        names = {"dense": "dense 16-bit", "fp8": "FP8", "int4": f"INT4, group {INT4_GROUP}"}
        return names.get(self.kind, f"sparse {round(100 * self.sparsity, 4):g}%")

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] weight."""
        if self.kind == "dense":
            return 2 * rows * columns
        if self.kind == "fp8":
            return rows * columns
        if self.kind == "int4":
            return rows * columns // 2 + 2 * rows * math.ceil(columns / INT4_GROUP)
        return compressed_nbytes(rows, columns, self.sparsity)


def formats(sparsities: list[float]) -> list[Format]:
    """What a plan compares: dense, FP8, INT4, and sparse at each share of zeros.

    Raises:
        ValueError: a share of zeros that is not from 0 up to, not including, 1.
    """
    return [Format("dense"), Format("fp8"), Format("int4"), *(Format("sparse", check(s)) for s in sparsities)]


def check(sparsity: float) -> float:
    """The share of zeros, if it is one.

    Raises:
        ValueError: it is not from 0 up to, not including, 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}: it takes a share of zeros from 0 up to, not including, 1, such as 0.6")
    return sparsity


def compressed_nbytes(rows: int, columns: int, sparsity: float) -> int:
    """Bytes of a layer in a compressed checkpoint, where those that would hardly shrink stay dense."""
    dense = 2 * rows * columns
    packed = packed_nbytes(rows, columns, sparsity)
    return packed if packed <= WORTH * dense else dense


@functools.lru_cache(maxsize=4096)
def packed_nbytes(rows: int, columns: int, sparsity: float) -> int:
    """Expected bytes of a packed [rows, columns] matrix whose zeros are anywhere with the same probability.

    Real pruned weights differ little: padding fills each lane's nonzeros of a tile to whole packets, and of a lane with
    many nonzeros that is half a packet on average whatever their distribution.

    Raises:
        ValueError: a size below 1, or a share of zeros that is none.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"a matrix of {rows} x {columns}: it needs at least one row and one column")
    tile_words = expected_tile_words(rows, columns, check(sparsity))
    strips, words, tiles = grid(rows, columns, tile_words)
    packets = _packets(rows, columns, 1 - sparsity, tile_words)
    return round(2 * PACKET_VALUES * packets) + 4 * strips * words * LANES + 4 * (strips * tiles + 1)


def expected_tile_words(rows: int, columns: int, sparsity: float) -> int:
    """What ``tensor.pack.choose_tile_words`` is expected to choose: the same rule, with expected counts."""
    density = 1 - sparsity
    strips, words, _ = grid(rows, columns, 1)
    nonzeros = rows * columns * density
    wanted = MAX_PADDING * (2 * nonzeros + strips * words * LANES * 4)
    best: tuple[bool, float, int] | None = None
    for tile_words in sorted(CHOSEN_TILE_WORDS, reverse=True):
        if tile_words > 2 * words:
            continue
        tiles = grid(rows, columns, tile_words)[2]
        fullest = min(tile_words, words) * WORD_BITS
        if strips * tiles * LANES * _overflow(fullest, density) > 0.5:  # one lane too full is likelier than none
            continue
        packets = _packets(rows, columns, density, tile_words)
        padded = 2 * (PACKET_VALUES * packets - nonzeros) > wanted
        if padded and best is not None:
            break
        work = busiest_work(strips, tiles, tile_words, int(packets))
        if best is None or (padded, work) < best[:2]:
            best = (padded, work, tile_words)
    return best[2] if best else min(CHOSEN_TILE_WORDS)


def _packets(rows: int, columns: int, density: float, tile_words: int) -> float:
    """Expected packets of a matrix."""
    full, rest = divmod(rows, STRIP_ROWS)
    strips = [(STRIP_ROWS, full)] * (full > 0) + [(rest, 1)] * (rest > 0)
    return sum(
        number * sum(lanes * _lane_packets(places, density) for places, lanes in _places(height, columns, tile_words))
        for height, number in strips
    )


@functools.lru_cache(maxsize=1024)
def _places(height: int, columns: int, tile_words: int) -> tuple[tuple[int, int], ...]:
    """(elements that a lane has in a tile, lanes of that kind) in a strip of ``height`` rows."""
    ones = torch.ones(height, columns, dtype=torch.int16)
    places, lanes = tile_counts(lane_counts(ones), tile_words).unique(return_counts=True)
    return tuple(zip(places.tolist(), lanes.tolist(), strict=True))


@functools.lru_cache(maxsize=4096)
def _lane_packets(places: int, density: float) -> float:
    """Expected packets of a lane: the sum over j of P(more than 8 j nonzeros)."""
    return float(sum(_tail(places, density, PACKET_VALUES * j) for j in range(math.ceil(places / PACKET_VALUES))))


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
