"""Which kernel and configuration for a device, a weight and a number of rows of X: a pure function."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from flash_llm.tensor.layout import LANES, STRIP_ROWS, WORD_COLUMNS, ValueKind, ceil_div, grid

_PASS_BYTES = 24 << 20  # of x, which all of the weight passes by: so much stays in the L2 cache of an H100
_UNPACK_FROM = {True: 2048, False: 257}  # rows of x; Hopper or not
_WORKSPACE_BYTES = 448 << 20  # that an expanded weight takes at a time: memory that the KV cache could have
_WORKSPACE_ROWS = 1024  # at least so many rows together, or multiplying them is slow
_UNPACK_WARPS = 8
_UNPACK_STAGE = STRIP_ROWS * (2 * WORD_COLUMNS + 16)  # bytes of a warp, besides its columns

FETCH_WARPS = 4
"""Warps of the Hopper kernel that fetch X: one does, but registers are dealt out by fours."""

_FETCH_REGISTERS = 32
_REGISTERS = 65536  # of a multiprocessor, on all of these architectures
_STATIC_BYTES = 128
_RESERVED = 1024  # of each block, by CUDA itself
_RING_EXTRA = 1024 + 128  # aligned by 1024, and its barriers
_WIDE_ADDRESSES = 22  # registers
_RING_BYTES = {1: 48 << 10, 2: 12 << 10, 3: 12 << 10}  # for pieces of X on Hopper, by blocks a multiprocessor
_WIDE_WARPS = 8  # a block's multiplying warps from 65 rows of x on: two warpgroups, as registers allow
_LARGE_WIDE_WARPS = {10: 12, 12: 12}  # by blocks of n, for large weights: three warpgroups are 3 to 4 % quicker there
_WIDE_PRODUCTS, _WIDE_DECODE = 32, 290  # cycles of a word for a block: for each block of 8 rows of x, and besides
_ADDING_UP = 0.25  # words' time for each block of 8 rows of x: what adding up a shared job costs
_UNEVEN = 3  # times that, where blocks have parts of two jobs
_LEAST_STAGES, _MOST_STAGES = 3, 6
_PIECES = {  # by blocks of n and words of a tile: words of a piece of X, and stages, found by measuring
    (4, 6): (3, 4),
    (4, 8): (4, 2),
    (4, 10): (4, 3),
    (4, 12): (4, 3),
    (4, 16): (4, 4),
    (8, 4): (2, 4),
    (8, 6): (2, 3),
    (8, 8): (4, 2),
    (8, 12): (4, 3),
    (8, 16): (4, 3),
}
_PAIRS = 16, 4  # up to so many blocks of n, of more than 8, pieces are two words, if there is room for so many
_X8_ROWS = 32  # of x, up to which 8-bit values are multiplied as they are, with x split in two
_X8_WORDS = 200  # of the weight a multiprocessor, from which on that repays a kernel of its own for splitting x
_X8_MIDDLE = 450  # words a multiprocessor, up to which small blocks are quicker even if there is room for 8 warps only
_SPLIT_WARPS = 4  # of a block
_LIGHT_BLOCKS = (2, 4, 6, 8)  # of n, with which a row block with few rows may count less
_LIGHT_DENSITY = 0.25  # of nonzeros, up to which it may
_LATE = 8  # one of so many blocks starts late
_SMALL = 700  # words of the weight a multiprocessor, up to which smaller blocks are thought of
_SMALL_CYCLES = {  # by blocks of n, warps and resident: what _small_blocks reckons with
    (1, 12, 1): (36, 118, 5800, 205),
    (1, 8, 1): (34, 152, 4850, 380),
    (1, 4, 2): (33, 156, 4680, 315),
    (1, 4, 3): (37, 123, 4470, 280),
    (2, 12, 1): (44, 110, 5860, 320),
    (2, 8, 1): (41, 141, 5460, 390),
    (2, 4, 2): (40, 142, 5200, 320),
    (2, 4, 3): (42, 136, 4730, 320),
    (4, 12, 1): (46, 132, 6290, 540),
    (4, 8, 1): (50, 156, 5920, 615),
    (4, 4, 2): (48, 164, 4700, 640),
    (6, 12, 1): (54, 128, 7420, 640),
    (6, 8, 1): (54, 156, 7180, 580),
    (6, 4, 2): (56, 164, 5230, 700),
    (8, 12, 1): (61, 123, 8550, 745),
    (8, 8, 1): (58, 157, 8440, 540),
    (8, 4, 2): (63, 165, 5760, 765),
}
_SMALL_TILE = {True: 20, False: 7}  # 16-bit values or not; words of a tile times blocks of n
_EARLY_TILE = {1: 12, 2: 12, 4: 12, 6: 12, 8: 10, 12: 4}  # by blocks of n: words of a tile up to which early loads help
_WIDE_EARLY_TILE = 8  # the same for others of more than 64 rows of x at a time; registers don't suffice for more
_CHUNK_WORDS = {
    True: {1: 8, 2: 8, 4: 2, 6: 2, 8: 2},
    False: {1: 8, 2: 8, 4: 4, 8: 2},
}  # Hopper or not; narrow tiles' blocks
_X8_CHUNK_WORDS = {1: 4, 2: 4, 4: 2}  # where 8-bit values are multiplied as they are


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
    larger: int
    """so many blocks, the first, have a unit more than the others"""
    late: int
    """from this block on they have a unit less"""
    whole: int
    """units before those of a last row block that count two thirds; all where none do"""
    row_blocks: int
    counters: int
    column_bytes: int
    partial_floats: int

    @property
    def share(self) -> int:
        """Units of the blocks between the first and the late ones."""
        return (self.counted - self.larger + self.blocks - self.late) // self.blocks

    @property
    def counted(self) -> int:
        """Units as they are dealt out."""
        return _counted(self.units, self.whole)

    @functools.cached_property
    def splits_x(self) -> bool:
        """Whether x goes to the tensor cores as two parts of 8 bits."""
        return bool(dict(self.defines).get("X8"))


def spmm_plan(
    device: Device,
    rows: int,
    columns: int,
    packets: int,
    max_packets: int,
    tile_words: int,
    n: int,
    bf16: bool,
    *,
    n_blocks: int | None = None,
    warps: int | None = None,
    resident: int | None = None,
    values: ValueKind = ValueKind.BITS16,
) -> SpmmPlan:
    """The sparse kernel's configuration for a packed [rows, columns] weight and x [n, columns].

    Args:
        packets: of the whole weight.
        max_packets: the most that a lane has in a tile.
        n_blocks: of 8 rows of x that are multiplied at a time; None, as the following, takes what was found best, as
            far as shared memory allows.
        warps: a block's multiplying warps.
        resident: blocks that are to share a multiprocessor, 1 to 3.
        values: how the weight's nonzeros are stored. Those of 8 bits are multiplied as they are on Hopper, up to 32
            rows of x and in weights that are not small, and widened to 16 bits elsewhere.

    Raises:
        ValueError: n is out of range.
    """
    if n < 1:
        raise ValueError(f"n={n} rows of x: it takes at least 1")
    column_bytes = _column_bytes(max_packets, values)
    strips, words, tiles = grid(rows, columns, tile_words)
    density = packets * values.packet_values / (strips * words * STRIP_ROWS * WORD_COLUMNS)
    block = _block(device, rows, columns, tile_words, density, n, column_bytes, values, n_blocks, warps, resident)
    row_blocks = ceil_div(strips, block.warps)
    jobs = row_blocks * ceil_div(n, 8 * block.n_blocks)
    units = jobs * tiles
    blocks = min(device.multiprocessors * block.resident, units)
    if block.wide:
        blocks, _ = _wide_shares(jobs, blocks, words, block.n_blocks)
    whole = _whole_units(block, strips, tiles, jobs, blocks, density)
    larger, late = _uneven_shares(_counted(units, whole), blocks)
    defines = {
        "TILE_WORDS": tile_words,
        "RAGGED": words % tile_words,
        "BF16": int(bf16),
        "VALUES": values.code,
        **block.defines(tile_words),
        "EARLY": int(_early(block, words % tile_words > 0, tile_words, values)),
        "LOAD_AFTER": _load_after(block, tile_words, values),
        **_packets_ahead(block, packets // (strips * tiles * LANES), max_packets, tile_words, values),
    }
    return SpmmPlan(
        source="spmm_sm90.cu" if block.hopper else "spmm_sm80.cu",
        defines=tuple(sorted(defines.items())),
        blocks=blocks,
        threads=(block.warps + (FETCH_WARPS if block.hopper else 0)) * LANES,
        shared=block.ring + block.warps * column_bytes,
        units=units,
        larger=larger,
        late=late,
        whole=whole,
        row_blocks=row_blocks,
        counters=jobs * block.warps,
        column_bytes=column_bytes,
        partial_floats=2 * blocks * block.n_blocks * 4 * block.warps * LANES,
    )


@dataclass(frozen=True)
class _Block:
    """What a block multiplies at a time, with how many warps, and how X is streamed through it."""

    hopper: bool
    x8: bool
    n_blocks: int
    warps: int
    resident: int
    chunk_words: int
    stages: int
    ring: int
    """bytes of shared memory for pieces of X and what belongs to them"""

    @property
    def wide(self) -> bool:
        """Whether more than 64 rows of x are multiplied at a time."""
        return self.n_blocks > 8

    @property
    def registers(self) -> int:
        """Of a multiplying thread, on Hopper."""
        return multiplying_registers(self.warps, self.resident)

    def defines(self, tile_words: int) -> dict[str, int]:
        """What the kernel is compiled with, of this."""
        found = {"N_BLOCKS": self.n_blocks, "CHUNK_WORDS": self.chunk_words, "WARPS": self.warps}
        if not self.hopper:
            return found
        found |= {"STAGES": self.stages, "WGMMA": int(self.n_blocks >= 4 and not self.x8), "RESIDENT": self.resident}
        found |= {"REGISTERS": self.registers, "FETCH_REGISTERS": _FETCH_REGISTERS}
        found |= {"X8": int(self.x8), "GROUP": _x8_group(tile_words, self.n_blocks) if self.x8 else 1}
        if self.n_blocks <= 2 and self.resident <= 2 and not self.x8:
            # More than enough; offered all, the compiler spills some for no reason.
            found["REGISTERS"] = min(found["REGISTERS"] - 8, 168)
        return found


def _block(
    device: Device,
    rows: int,
    columns: int,
    tile_words: int,
    density: float,
    n: int,
    column_bytes: int,
    values: ValueKind,
    n_blocks: int | None,
    warps: int | None,
    resident: int | None,
) -> _Block:
    """The block for a weight and n rows of x: as asked for, or as was found best and fits into shared memory."""
    hopper = device.capability == (9, 0)
    n_blocks = n_blocks or _n_blocks(device, rows, columns, n, column_bytes, tile_words)
    wide = n_blocks > 8
    words = _words(rows, columns)
    x8 = hopper and values is not ValueKind.BITS16 and n <= _X8_ROWS and words >= _X8_WORDS * device.multiprocessors
    if hopper and not wide and warps is None and resident is None:
        if x8 and n_blocks <= 2:
            warps, resident = _x8_blocks(device, rows, columns, tile_words, n_blocks, column_bytes)
        else:
            warps, resident = _small_blocks(device, rows, columns, tile_words, density, n_blocks, values)
    resident = resident or 1
    if wide:
        large = words > _SMALL * device.multiprocessors
        warps = warps or (large and _LARGE_WIDE_WARPS.get(n_blocks)) or _WIDE_WARPS
    wanted = warps or _best_warps(hopper, n_blocks, tile_words)
    if hopper:
        chunk_words, stages = _pieces(device, x8, n_blocks, tile_words, wanted, resident, column_bytes)
    else:
        chunk_words, stages = chunk(tile_words, _CHUNK_WORDS[False][n_blocks]), 2
    ring = stages * _stage(n_blocks, chunk_words, hopper, x8) + (_RING_EXTRA if hopper else 0)
    if warps is None:
        fitting = (device.shared_memory - _STATIC_BYTES - ring) // column_bytes
        warps = max(4, min(wanted, fitting // 4 * 4))
    return _Block(hopper, x8, n_blocks, warps, resident, chunk_words, stages, ring)


def _stage(n_blocks: int, chunk_words: int, hopper: bool, x8: bool) -> int:
    """Bytes of a piece of X, and of what belongs to it."""
    return n_blocks * 8 * (chunk_words * WORD_COLUMNS * 2 + (0 if hopper else 16) + (4 if x8 else 0))


def _pieces(
    device: Device, x8: bool, n_blocks: int, tile_words: int, warps: int, resident: int, column_bytes: int
) -> tuple[int, int]:
    """Words of a piece of X on Hopper, and pieces that there is room for: the ring.

    Larger pieces are waited for less often; and a ring that holds whole tiles takes 5 % fewer instructions, since a
    tile's pieces are then where the compiler expects them.
    """
    columns = warps * column_bytes

    def stages(words: int, ring_bytes: int, least: int) -> int:
        found = max(least, min(_MOST_STAGES, ring_bytes // _stage(n_blocks, words, True, x8)))
        whole_tiles = found - found % ceil_div(tile_words, words)
        return whole_tiles if whole_tiles >= _LEAST_STAGES else found

    room = _room(device) - columns
    if n_blocks > 8:
        pair = chunk(tile_words, 2)
        pairs = stages(pair, room, 0)
        return (pair, pairs) if n_blocks <= _PAIRS[0] and pairs >= _PAIRS[1] else (1, stages(1, room, 0))
    if x8:
        words = 8 if (n_blocks, tile_words, warps) == (1, 8, 16) else chunk(tile_words, _X8_CHUNK_WORDS[n_blocks])
        return words, stages(words, min(_RING_BYTES[resident], room), _LEAST_STAGES)
    if (n_blocks, tile_words) in _PIECES:
        words, found = _PIECES[n_blocks, tile_words]
        ring = found * _stage(n_blocks, words, True, x8) + _RING_EXTRA
        if fit_together(device, ring + columns, resident):
            return words, found
    words = chunk(tile_words, _CHUNK_WORDS[True][n_blocks])
    return words, stages(words, _RING_BYTES[resident], _LEAST_STAGES)


def _early(block: _Block, ragged: bool, tile_words: int, values: ValueKind) -> bool:
    """Whether all that a tile asks for ahead is asked for early in it, for more registers, as was found quicker.

    By 2 to 5 % at 32 rows of x with 16-bit values, and by 3 to 4 % at 8 rows with those of 8 bits. But 16 rows are 4 to
    8 % slower for it where a strip's last tile is smaller than the others.
    """
    if values is ValueKind.BITS16:
        slower = ragged and block.n_blocks == 2
        return block.hopper and tile_words <= _EARLY_TILE.get(block.n_blocks, _WIDE_EARLY_TILE) and not slower
    return block.x8 and tile_words >= 8 * block.n_blocks


def _load_after(block: _Block, tile_words: int, values: ValueKind) -> int:
    """The word of a tile after which the next tile's packets are asked for: the later, the more likely are the bitmaps
    there that say where they are. With some tiles of 8 words the first was found quicker, by 1 to 3 %."""
    of_16_bits = values is ValueKind.BITS16 and block.n_blocks in (4, 8)
    first = block.hopper and tile_words == 8 and (of_16_bits or (block.x8 and block.chunk_words < 8))
    return 0 if first else tile_words // 8


def _packets_ahead(block: _Block, mean: int, max_packets: int, tile_words: int, values: ValueKind) -> dict[str, int]:
    """How many packets of the next tile a thread holds, and how many of these most likely every lane has.

    Args:
        mean: packets of a lane in a tile.
    """
    held = 10 if block.warps > 12 else max_packets  # that many warps have registers for no more
    if block.wide:
        held = _wide_held(block.registers, block.n_blocks, tile_words)
    ahead = max(1, min(max_packets, mean + 3, held))
    full = mean - (2 if values is ValueKind.BITS16 else 1)
    return {"PACKETS_AHEAD": ahead, "LIKELY_FULL": max(1, min(full, ahead))}


def rows_in_a_pass(n: int, columns: int) -> int:
    """Rows of x [n, columns] that one launch takes: of many some, in equal parts, so that they stay in the L2 cache."""
    if 2 * n * columns <= _PASS_BYTES * 4 // 3:
        return n
    passes = ceil_div(n, max(256, _PASS_BYTES // (2 * columns) // 256 * 256))
    return ceil_div(n, 256 * passes) * 256


def unpack_from(device: Device) -> int:
    """From as many rows of x on the weight is expanded into a workspace and multiplied densely."""
    return _UNPACK_FROM[device.capability == (9, 0)]


def rows_unpacked(rows: int, columns: int) -> int:
    """Rows of a weight [rows, columns] that are expanded and multiplied at a time, whole strips of it."""
    parts = max(1, min(ceil_div(2 * rows * columns, _WORKSPACE_BYTES), rows // _WORKSPACE_ROWS))
    return ceil_div(rows, STRIP_ROWS * parts) * STRIP_ROWS


@dataclass(frozen=True)
class UnpackPlan:
    """A configuration of the kernel that expands a weight."""

    defines: tuple[tuple[str, int], ...]
    blocks: int
    threads: int
    shared: int
    column_bytes: int


def unpack_plan(
    device: Device,
    rows: int,
    columns: int,
    max_packets: int,
    tile_words: int,
    bf16: bool,
    values: ValueKind = ValueKind.BITS16,
) -> UnpackPlan:
    """The configuration for a packed [rows, columns] weight whose lanes have ``max_packets`` in a tile at most."""
    strips, _, tiles = grid(rows, columns, tile_words)
    column_bytes = _column_bytes(max_packets, values)
    a_warp = column_bytes + _UNPACK_STAGE
    warps = min(_UNPACK_WARPS, (device.shared_memory - _STATIC_BYTES) // a_warp)
    resident = max(1, min(8, device.shared_memory // (warps * a_warp + 1024)))
    return UnpackPlan(
        defines=(
            ("ALIGNED", int(columns % 8 == 0)),
            ("BF16", int(bf16)),
            ("TILE_WORDS", tile_words),
            ("VALUES", values.code),
        ),
        blocks=min(ceil_div(strips * tiles, warps), resident * device.multiprocessors),
        threads=warps * LANES,
        shared=warps * a_warp,
        column_bytes=column_bytes,
    )


@dataclass(frozen=True)
class SplitPlan:
    """A configuration of the kernel that splits x into two parts of 8 bits: ``csrc/split_x.cu``."""

    defines: tuple[tuple[str, int], ...]
    blocks: int
    threads: int


def split_plan(n: int, tiles: int, tile_words: int, bf16: bool, values: ValueKind) -> SplitPlan:
    """The configuration for x of n rows, and a weight with 8-bit values of that kind and ``tiles`` tiles in a row."""
    return SplitPlan(
        defines=(("BF16", int(bf16)), ("TILE_WORDS", tile_words), ("VALUES", values.code), ("WARPS", _SPLIT_WARPS)),
        blocks=ceil_div(n * tiles, _SPLIT_WARPS),
        threads=_SPLIT_WARPS * LANES,
    )


def _column_bytes(max_packets: int, values: ValueKind) -> int:
    """Shared memory of a warp: its lanes' columns for a tile."""
    return (values.packet_values * max(max_packets, 1) + 1) * 4 * LANES


def _n_blocks(device: Device, rows: int, columns: int, n: int, column_bytes: int, tile_words: int) -> int:
    """Blocks of 8 rows of x that one pass over the weight takes."""
    hopper = device.capability == (9, 0)
    narrow = next((blocks for blocks in _CHUNK_WORDS[hopper] if n <= 8 * blocks), 8)
    if n <= 64 or not hopper:
        return narrow

    def cycles(blocks: int) -> float:
        jobs = ceil_div(rows, STRIP_ROWS * _WIDE_WARPS) * ceil_div(n, 8 * blocks)
        _, words = _wide_shares(jobs, device.multiprocessors, ceil_div(columns, WORD_COLUMNS), blocks)
        return words * (_WIDE_PRODUCTS * blocks + _WIDE_DECODE)

    wide = [
        blocks
        for blocks in (32, 28, 24, 20, 16, 14, 12, 10)
        if (_room(device) - _WIDE_WARPS * column_bytes) // _stage(blocks, 1, True, False) >= _LEAST_STAGES
        and _wide_held(multiplying_registers(_WIDE_WARPS, 1), blocks, tile_words) > 0
    ]
    return min(wide, key=cycles, default=narrow)


def _wide_shares(jobs: int, most: int, words: int, n_blocks: int) -> tuple[int, float]:
    """Blocks that jobs of so many words are dealt out to, ``most`` at most, and about how many words' time that takes.

    An even share for all leaves nobody idle, but most blocks then have a part of two jobs that they share with others,
    and adding up many sums is slow. Some blocks less may have whole jobs, or all of them the same part of one.
    """
    adding = n_blocks * _ADDING_UP
    rounds, parts = ceil_div(jobs, most), most // jobs
    uneven = jobs * words / most + _UNEVEN * adding
    choices = {min(most, jobs * words): uneven, ceil_div(jobs, rounds): float(rounds * words)}
    if parts > 1:
        choices[jobs * parts] = words / parts + adding
    best = min(choices, key=lambda blocks: choices[blocks])
    return best, choices[best]


def _uneven_shares(units: int, blocks: int) -> tuple[int, int]:
    """(larger, late): as many blocks have a unit more than their share, and those from ``late`` on one less.

    Where kernels follow each other, blocks start as the ones before them end, the last of them by some microseconds
    late, about the time of a unit. They get a unit less if the others can take it and still none has more than the most
    of even shares: then nothing is lost where all start at once.
    """
    share, larger = divmod(units, blocks)
    spared = blocks // _LATE
    if share > 1 and larger and larger + spared <= blocks - spared:
        return larger + spared, blocks - spared
    return larger, blocks


def _whole_units(block: _Block, strips: int, tiles: int, jobs: int, blocks: int, density: float) -> int:
    """The units before those that count as two thirds, or all.

    Where a third of the last row block's warps at most have rows, its tiles are soon over, and the blocks that have
    them take half as many more if that spares all others one: 4 to 5 % of the time at 7168 x 28672 and 80 % zeros. That
    is so where decoding is the limit. With many nonzeros, such a tile takes hardly less time than any other.
    """
    units = jobs * tiles
    with_rows = strips % block.warps
    few = 0 < 3 * ceil_div(with_rows, 4) * 4 <= block.warps < strips
    decoding_is_the_limit = block.n_blocks in _LIGHT_BLOCKS and density <= _LIGHT_DENSITY
    last = jobs * block.warps < strips + block.warps  # no more rows of x are multiplied after it
    if not (block.hopper and not block.x8 and few and decoding_is_the_limit and last and units >= 4 * blocks):
        return units
    whole = units - tiles
    return whole if ceil_div(_counted(units, whole), blocks) < ceil_div(units, blocks) else units


def _counted(units: int, whole: int) -> int:
    """Units as they are dealt out, if those after the first ``whole`` count two thirds."""
    return whole + ceil_div(2 * (units - whole), 3)


def _wide_held(registers: int, n_blocks: int, tile_words: int) -> int:
    """Packets that a thread holds ahead, after sums, two words' A registers, two tiles' bitmaps and addresses."""
    return (registers - 4 * n_blocks - 32 - 2 * tile_words - tile_words * 3 // 4 - _WIDE_ADDRESSES) // 4


def fit_together(device: Device, shared: int, resident: int) -> bool:
    """Whether a multiprocessor has shared memory for ``resident`` blocks of ``shared`` bytes each."""
    return resident * (shared + _STATIC_BYTES + _RESERVED) <= device.shared_memory + _RESERVED


def _room(device: Device) -> int:
    """Shared memory of a block of the Hopper kernel, for pieces of x and the warps' columns."""
    return device.shared_memory - _STATIC_BYTES - _RING_EXTRA


def _best_warps(hopper: bool, n_blocks: int, tile_words: int) -> int:
    """Warps of a block that were found quickest on an H100, and that leave each the registers it needs."""
    if n_blocks >= 6 and tile_words > (12 if hopper else 6):
        return 8
    return 12 if hopper or tile_words > 8 or n_blocks > 2 else 16


def _small_blocks(
    device: Device, rows: int, columns: int, tile_words: int, density: float, n_blocks: int, values: ValueKind
) -> tuple[int, int] | tuple[None, None]:
    """(warps, resident) of smaller blocks for a weight that is soon read, if they promise to be quicker than one large
    block for each multiprocessor.

    Small blocks share the work more evenly, and where several fit at a time, the next kernel's first blocks load their
    weights while this one's last ones still work. Cycles of a warp's word, as many more for each nonzero of an element,
    those of a launch, and those of each block that shares a job are fitted to an H100, from 2048 x 2048 to 9216 x 9216
    and 50 to 90 % zeros: within 5 % of what was measured, root mean square. Six blocks of n lie between four and eight.
    """
    strips, _, tiles = grid(rows, columns, tile_words)
    if _words(rows, columns) > _SMALL * device.multiprocessors:
        return None, None

    def cycles(choice: tuple[int, int]) -> float:
        warps, resident = choice
        a_word, nonzeros, launch, sharing = _SMALL_CYCLES[n_blocks, warps, resident]
        row_blocks = ceil_div(strips, warps)
        blocks = min(device.multiprocessors * resident, row_blocks * tiles)
        words = ceil_div(row_blocks * tiles, blocks) * tile_words * warps * resident
        return words * (a_word + nonzeros * density) + launch + sharing * blocks / row_blocks

    # Of three blocks, a thread has too few registers for large tiles.
    most = 3 if tile_words * n_blocks <= _SMALL_TILE[values is ValueKind.BITS16] else 2
    choices = [(warps, some) for blocks, warps, some in _SMALL_CYCLES if blocks == n_blocks and some <= most]
    best = min(choices, key=cycles)
    return (None, None) if best == (12, 1) else best


def _x8_blocks(
    device: Device, rows: int, columns: int, tile_words: int, n_blocks: int, column_bytes: int
) -> tuple[int, int]:
    """(warps, resident) where 8-bit values are multiplied as they are: 16 warps a multiprocessor, if there is room.

    Two blocks of 8 of them for a weight that is soon read, for the reasons of :func:`_small_blocks`, and for small
    tiles and up to 8 rows of x, where they are 1 to 4 % quicker.
    """

    def fits(warps: int, resident: int) -> bool:
        if warps * resident == 16 and tile_words > (12 if n_blocks == 1 else 12 - 2 * resident):
            return False  # a thread's registers don't suffice
        return fit_together(device, ring + warps * column_bytes, resident)

    stage = _stage(n_blocks, chunk(tile_words, _X8_CHUNK_WORDS[n_blocks]), True, True)
    ring = _LEAST_STAGES * stage + _RING_EXTRA
    words = _words(rows, columns) / device.multiprocessors
    if words <= _SMALL and fits(8, 2):
        return 8, 2
    if words <= _X8_MIDDLE:
        return 4, 2
    if n_blocks == 1 and tile_words <= 6 and fits(8, 2):
        return 8, 2
    return next(((warps, 1) for warps in (16, 12, 8) if fits(warps, 1)), (4, 1))


def _x8_group(tile_words: int, n_blocks: int) -> int:
    """Words that are multiplied together, as was quickest; a tile must have an even number of such groups."""
    return 2 if (tile_words, n_blocks) in ((4, 1), (4, 2)) else 1


def _words(rows: int, columns: int) -> int:
    """Bitmap words of a lane in all of a weight."""
    return ceil_div(rows, STRIP_ROWS) * ceil_div(columns, WORD_COLUMNS)


def multiplying_registers(warps: int, resident: int) -> int:
    """Registers of a thread of the Hopper kernel's ``warps`` multiplying warps, ``resident`` blocks a multiprocessor.

    A block begins with an equal share for each thread. The four warps that fetch keep 32; the others share the rest of
    what the block began with (not of what the multiprocessor has: asking for more waits for ever).
    """
    threads = (warps + FETCH_WARPS) * LANES
    share = min(255, _REGISTERS // (threads * resident)) // 8 * 8
    rest = (share * threads - _FETCH_REGISTERS * FETCH_WARPS * LANES) // (warps * LANES) // 8 * 8
    return min(rest, max(240, share))


def chunk(tile_words: int, most: int) -> int:
    """Words of X kept at a time: a tile's, in equal parts of at most ``most``."""
    return ceil_div(tile_words, ceil_div(tile_words, most))
