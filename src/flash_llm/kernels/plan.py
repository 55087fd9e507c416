"""Which kernel and configuration for a device, a weight and a number of rows of X: a pure function."""

from __future__ import annotations

from dataclasses import dataclass

from flash_llm.tensor.layout import LANES, PACKET_VALUES, WORD_COLUMNS, ceil_div, grid

MAX_N = 64
"""Rows of X that one launch of the sparse kernel takes; more are taken in turns."""

UNPACK_FROM = 257
"""From as many rows on the weight is expanded into a workspace and multiplied densely."""

FETCH_WARPS = 4
"""Warps of the Hopper kernel that fetch X: one does, but registers are dealt out by fours."""

_FETCH_REGISTERS = 24
_REGISTERS = 65536  # of a multiprocessor, on all of these architectures
_STATIC_BYTES = 128
_RING_BYTES = 48 << 10  # for the pieces of X on Hopper, enough to cover L2's latency
_CHUNK_WORDS = {True: {1: 4, 2: 4, 4: 2, 8: 2}, False: {1: 8, 2: 8, 4: 4, 8: 2}}  # Hopper or not; blocks of n


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    """bytes that one block may have"""


@dataclass(frozen=True)
class SpmmPlan:
    """A configuration of the sparse kernels: ``csrc/spmm.cuh`` explains the names."""

    source: str
    defines: tuple[tuple[str, int], ...]
    blocks: int
    threads: int
    shared: int
    units: int
    row_blocks: int
    column_bytes: int
    partial_floats: int


def spmm_plan(
    device: Device,
    rows: int,
    columns: int,
    packets: int,
    max_packets: int,
    tile_words: int,
    n: int,
    bf16: bool,
    warps: int | None = None,
) -> SpmmPlan:
    """The sparse kernel's configuration for a packed [rows, columns] weight and x [n, columns], n from 1 to MAX_N.

    Args:
        packets: of the whole weight.
        max_packets: the most that a lane has in a tile.
        warps: a block's multiplying warps; None takes as many as shared memory allows, up to what was found best.

    Raises:
        ValueError: n is out of range.
    """
    if not 1 <= n <= MAX_N:
        raise ValueError(f"n={n} rows of x: one launch takes 1 to {MAX_N}; take more in turns")
    n_blocks = next(blocks for blocks in (1, 2, 4, 8) if n <= 8 * blocks)
    hopper = device.capability == (9, 0)
    chunk_words = chunk(tile_words, _CHUNK_WORDS[hopper][n_blocks])
    column_bytes = (PACKET_VALUES * max(max_packets, 1) + 1) * 4 * LANES
    stage = n_blocks * 8 * (chunk_words * WORD_COLUMNS * 2 + (0 if hopper else 16))
    stages = max(3, min(6, _RING_BYTES // stage)) if hopper else 2
    ring = stages * stage + (1024 + 128 if hopper else 0)  # aligned by 1024, and its barriers
    strips, words, tiles = grid(rows, columns, tile_words)
    if warps is None:
        fitting = (device.shared_memory - _STATIC_BYTES - ring) // column_bytes
        warps = max(4, min(_best_warps(hopper, n_blocks, tile_words), fitting // 4 * 4))
    row_blocks = ceil_div(strips, warps)
    units = row_blocks * tiles
    blocks = min(device.multiprocessors, units)
    mean = int(packets / (strips * tiles * LANES))  # packets of a lane in a tile
    ahead = max(1, min(max_packets, mean + 3))
    defines = {
        "TILE_WORDS": tile_words,
        "N_BLOCKS": n_blocks,
        "CHUNK_WORDS": chunk_words,
        "RAGGED": int(words % tile_words != 0),
        "PACKETS_AHEAD": ahead,
        "LIKELY_FULL": max(1, min(mean - 2, ahead)),
        "WARPS": warps,
        "BF16": int(bf16),
    }
    if hopper:
        defines |= {"STAGES": stages, "WGMMA": int(n_blocks >= 4), "REGISTERS": multiplying_registers(warps)}
    return SpmmPlan(
        source="spmm_sm90.cu" if hopper else "spmm_sm80.cu",
        defines=tuple(sorted(defines.items())),
        blocks=blocks,
        threads=(warps + (FETCH_WARPS if hopper else 0)) * LANES,
        shared=ring + warps * column_bytes,
        units=units,
        row_blocks=row_blocks,
        column_bytes=column_bytes,
        partial_floats=2 * blocks * n_blocks * 4 * warps * LANES,
    )


def _best_warps(hopper: bool, n_blocks: int, tile_words: int) -> int:
    """Warps of a block that were found quickest on an H100, and that leave each the registers it needs."""
    if n_blocks == 8 and tile_words > (8 if hopper else 6):
        return 8
    return 12 if hopper or tile_words > 8 or n_blocks > 2 else 16


def multiplying_registers(warps: int) -> int:
    """Registers of a thread of the Hopper kernel's ``warps`` multiplying warps.

    A block begins with an equal share for each thread. The four warps that fetch keep 24; the others share the rest of
    what the block began with (not of what the multiprocessor has: asking for more waits for ever).
    """
    threads = (warps + FETCH_WARPS) * LANES
    share = min(255, _REGISTERS // threads) // 8 * 8
    return min(240, (share * threads - _FETCH_REGISTERS * FETCH_WARPS * LANES) // (warps * LANES) // 8 * 8)


def chunk(tile_words: int, most: int) -> int:
    """Words of X kept at a time: a tile's, in equal parts of at most ``most``."""
    return ceil_div(tile_words, ceil_div(tile_words, most))
