"""Dense to packed and back, in torch operations alone: the same bits on any device.

Work goes strip by strip in chunks, so that memory stays near the dense matrix's own size. A chunk is laid out *in lane
order*, ``[strip, tile, lane, element]``; then the bitmap is a few shifts, and the values are one ``masked_select``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_llm.tensor.layout import (
    CHOSEN_TILE_WORDS,
    LANE_CAPACITY,
    LANES,
    MAX_PADDING,
    PACKET_VALUES,
    STRIP_ROWS,
    WORD_BITS,
    WORD_COLUMNS,
    ValueKind,
    ceil_div,
    grid,
)

_STEPS = WORD_BITS // 4
STORED = 0x100
"""Marks an element of the bitmap where an 8-bit value is carried in 16 bits: one that rounded to 0 is stored too."""

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}


@dataclass(frozen=True)
class PackedTensors:
    """The three tensors of a packed matrix: see ``docs/format.md``."""

    bitmap: Tensor
    values: Tensor
    offsets: Tensor
    tile_words: int
    max_packets: int


def strip_chunks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of strips that are worked on at a time: (first, last + 1)."""
    strips = ceil_div(rows, STRIP_ROWS)
    step = max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 22) // (STRIP_ROWS * max(columns, WORD_COLUMNS)))
    for first in range(0, strips, step):
        yield first, min(first + step, strips)


def pack(raw: Tensor, kind: ValueKind, tile_words: int | None = None) -> PackedTensors:
    """Packs a [M, K] int16 matrix. ``tile_words`` None: see :func:`choose_tile_words`.

    Args:
        raw: the bits of 16-bit floats; or ``STORED`` and an 8-bit value where one is stored, and 0 elsewhere.
        kind: which of the two.

    Returns:
        With values of int16, or uint8, which the caller knows the meaning of.
    """
    rows, columns = raw.shape
    per_packet = kind.packet_values
    if tile_words is None:
        tile_words = choose_tile_words(lane_counts(raw), kind)
    strips, words, tiles = grid(rows, columns, tile_words)
    bitmap = torch.empty(strips, words, LANES, dtype=torch.int32, device=raw.device)
    values, packets = [], []
    max_packets = 0
    for first, last in strip_chunks(rows, columns, raw.device):
        lanes = _to_lane_order(raw[first * STRIP_ROWS : last * STRIP_ROWS], words, tile_words, kind)
        mask = _nonzero(lanes)
        bits = _bits_from_mask(mask, kind).view(last - first, tiles, LANES, tile_words).transpose(2, 3)
        bitmap[first:last] = bits.reshape(last - first, tiles * tile_words, LANES)[:, :words]
        counts = mask.sum(-1, dtype=torch.int32)
        in_lanes = _packets(counts, per_packet)
        chosen = _select(lanes, mask, counts, per_packet)
        chosen = chosen if kind is ValueKind.BITS16 else chosen.to(torch.uint8)
        values.append(chosen.view(-1, per_packet)[_packet_order(in_lanes)])
        packets.append(in_lanes.sum(-1).flatten())
        max_packets = max(max_packets, int(in_lanes.max()))
    offsets = packet_offsets(torch.cat(packets), rows, columns)
    return PackedTensors(bitmap, torch.cat(values).view(-1), offsets, tile_words, max_packets)


def unpack(packed: PackedTensors, rows: int, columns: int) -> Tensor:
    """The [M, K] int16 matrix that :func:`pack` was given."""
    bitmap, tile_words = packed.bitmap, packed.tile_words
    _, words, tiles = grid(rows, columns, tile_words)
    raw = torch.empty(rows, columns, dtype=torch.int16, device=bitmap.device)
    of_8_bits = packed.values.element_size() == 1
    kind = ValueKind.INT8 if of_8_bits else ValueKind.BITS16
    source = packed.values.view(torch.uint8 if of_8_bits else torch.int16).view(-1, kind.packet_values)
    for first, last in strip_chunks(rows, columns, bitmap.device):
        mask = mask_from_bitmap(bitmap[first:last], tile_words, kind)
        counts = mask.sum(-1, dtype=torch.int32)
        begin, end = (int(packed.offsets[i * tiles]) for i in (first, last))
        by_lane = torch.empty(end - begin, kind.packet_values, dtype=torch.int16, device=bitmap.device)
        order = _packet_order(_packets(counts, kind.packet_values))
        by_lane[order] = source[begin:end].to(torch.int16) | (STORED if of_8_bits else 0)
        lanes = _spread(by_lane.view(-1), mask, counts, kind.packet_values)
        top, bottom = first * STRIP_ROWS, min(last * STRIP_ROWS, rows)
        raw[top:bottom] = _from_lane_order(lanes, words, kind)[: bottom - top, :columns]
    return raw


def lane_counts(raw: Tensor) -> Tensor:
    """Nonzeros of every lane in every word, [strips, words, 32], of a [M, K] int16 matrix."""
    rows, columns = raw.shape
    _, words, _ = grid(rows, columns, 1)
    counts = []
    for first, last in strip_chunks(rows, columns, raw.device):
        lanes = _to_lane_order(raw[first * STRIP_ROWS : last * STRIP_ROWS], words, 1, ValueKind.BITS16)
        counts.append(_nonzero(lanes).sum(-1, dtype=torch.int16))
    return torch.cat(counts)


def choose_tile_words(counts: Tensor, kind: ValueKind = ValueKind.BITS16) -> int:
    """The tile size for a matrix, from its ``lane_counts``; the same on any device.

    Among the sizes whose lanes stay within LANE_CAPACITY and whose padding to whole packets costs little, the one that
    :func:`busiest_work` finds quickest. Large matrices get large tiles: a tile costs a kernel some fixed instructions.
    Small ones get tiles that can be shared out evenly.
    """
    strips, words, lanes = counts.shape
    nonzeros = int(counts.sum(dtype=torch.int64))
    wanted = MAX_PADDING * (kind.nbytes * nonzeros + strips * words * lanes * 4)
    best: tuple[bool, float, int] | None = None
    for tile_words in sorted(CHOSEN_TILE_WORDS, reverse=True):
        if tile_words > 2 * words:
            continue  # a smaller one covers the whole row as well
        in_tiles = tile_counts(counts, tile_words)
        if int(in_tiles.max()) > LANE_CAPACITY:
            continue
        packets = int(_packets(in_tiles, kind.packet_values).sum(dtype=torch.int64))
        padded = kind.nbytes * (kind.packet_values * packets - nonzeros) > wanted
        if padded and best is not None:
            break  # smaller tiles are padded more
        work = busiest_work(strips, in_tiles.shape[1], tile_words, packets, kind)
        if best is None or (padded, work) < best[:2]:
            best = (padded, work, tile_words)
    return best[2] if best else min(CHOSEN_TILE_WORDS)


_SMALL_WORDS = 92_400
"""Bitmap words of a lane in a matrix up to which kernels have smaller blocks to share it out more evenly: those of
``kernels.plan``, 700 for each of 132 multiprocessors."""


def busiest_work(strips: int, tiles: int, tile_words: int, packets: int, kind: ValueKind = ValueKind.BITS16) -> float:
    """Instructions of the busiest multiprocessor's warps, with a kernel's measured costs, on a GPU of usual size."""
    blocks = ((12, 1), (8, 1), (4, 2)) if strips * tiles * tile_words <= _SMALL_WORDS else ((12, 1),)
    shares = (
        ceil_div(ceil_div(strips, warps) * tiles, 132 * resident) * warps * resident for warps, resident in blocks
    )
    rounds = min(shares) / 12
    a_packet = 17 * kind.packet_values // PACKET_VALUES
    # On an H100: ten words of 8-bit values are 4 to 9 % slower than eight, as they can't be multiplied in pairs, and
    # sixteen words of 16-bit values 4 to 6 % slower than twelve.
    slower = {(True, 10): 1.1, (False, 16): 1.07}.get((kind is not ValueKind.BITS16, tile_words), 1.0)
    return rounds * slower * (200 + 105 * tile_words + a_packet * (2 + packets / (strips * tiles * LANES)))


def packet_offsets(packets: Tensor, rows: int, columns: int) -> Tensor:
    """Where each tile's packets begin, and where they end: int32 [tiles + 1], from how many each tile has, [tiles].

    Raises:
        ValueError: the matrix of ``rows`` x ``columns`` has too many.
    """
    offsets = torch.zeros(len(packets) + 1, dtype=torch.int64, device=packets.device)
    torch.cumsum(packets, 0, out=offsets[1:])
    if int(offsets[-1]) >= 2**31:
        raise ValueError(
            f"a matrix of {rows} x {columns} has {int(offsets[-1])} packets of nonzeros; the format's offsets end at "
            f"2**31: split the matrix by rows"
        )
    return offsets.to(torch.int32)


def tile_counts(counts: Tensor, tile_words: int) -> Tensor:
    """Sums ``lane_counts`` over tiles: [strips, tiles, 32]."""
    strips, words, lanes = counts.shape
    tiles = ceil_div(words, tile_words)
    padded = torch.nn.functional.pad(counts, (0, 0, 0, tiles * tile_words - words))
    return padded.view(strips, tiles, tile_words, lanes).sum(2, dtype=torch.int32)


def word_counts(bitmap: Tensor) -> Tensor:
    """Bits set in every bitmap word, [strips, words, 32], as int16."""
    x = bitmap - ((bitmap >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).bitwise_and_(0xFF).to(torch.int16)


def mask_from_bitmap(bitmap: Tensor, tile_words: int, kind: ValueKind) -> Tensor:
    """The nonzero mask in lane order, [strips, tiles, 32, 32 * tile_words] bool, of some strips' bitmap."""
    strips, words, _ = bitmap.shape
    tiles = ceil_div(words, tile_words)
    padded = torch.nn.functional.pad(bitmap, (0, 0, 0, tiles * tile_words - words))
    bits = padded.view(strips, tiles, tile_words, LANES).transpose(2, 3).unsqueeze(-1)
    bytes_ = (bits >> _shifts(kind, bitmap.device)) & 0x01010101
    mask = bytes_.contiguous().view(torch.bool)
    return mask.roll(-_turn(kind), dims=-1).view(strips, tiles, LANES, tile_words * WORD_BITS)


def _to_lane_order(raw: Tensor, words: int, tile_words: int, kind: ValueKind) -> Tensor:
    """[rows, K] int16 to [strips, tiles, 32 lanes, 32 * tile_words elements], padded with zeros."""
    rows, columns = raw.shape
    strips, tiles = ceil_div(rows, STRIP_ROWS), ceil_div(words, tile_words)
    width = tiles * tile_words * WORD_COLUMNS
    if (rows, columns) != (strips * STRIP_ROWS, width):
        raw = torch.nn.functional.pad(raw, (0, width - columns, 0, strips * STRIP_ROWS - rows))
    # Two neighbouring columns always travel together: half the elements to move as int32.
    pairs = raw.view(torch.int32).view(strips, 2, 8, tiles, tile_words * 4, 2, 4)
    order = (0, 3, 2, 6, 4, 5, 1) if kind is ValueKind.BITS16 else (0, 3, 2, 6, 4, 1, 5)
    return pairs.permute(order).contiguous().view(torch.int16).view(strips, tiles, LANES, -1)


def _from_lane_order(lanes: Tensor, words: int, kind: ValueKind) -> Tensor:
    """The inverse of :func:`_to_lane_order`: [16 * strips, padded K]."""
    strips, tiles, _, elements = lanes.shape
    pairs = lanes.view(torch.int32).view(strips, tiles, 8, 4, elements // 8, 2, 2)
    order = (0, 6, 2, 1, 4, 5, 3) if kind is ValueKind.BITS16 else (0, 5, 2, 1, 4, 6, 3)
    return pairs.permute(order).contiguous().view(torch.int16).view(strips * STRIP_ROWS, -1)


def _nonzero(raw: Tensor) -> Tensor:
    return (raw & 0x7FFF) != 0  # both zeros, +0.0 and -0.0, are dropped


def _shifts(kind: ValueKind, device: torch.device) -> Tensor:
    """Which bit of its byte each of a lane's four elements in turn has: see ``layout.bit_position``."""
    shifts = torch.arange(_STEPS, dtype=torch.int32, device=device)
    return shifts.flip(0) if kind is ValueKind.BITS16 else shifts


def _turn(kind: ValueKind) -> int:
    """Places that elements are moved on by before they become bits."""
    return 1 if kind is ValueKind.BITS16 else 0


def _bits_from_mask(mask: Tensor, kind: ValueKind) -> Tensor:
    """Bitmap words of a mask whose last dimension is a multiple of 32 elements: see ``layout.bit_position``."""
    bytes_ = mask.view(-1, WORD_BITS).roll(_turn(kind), dims=-1).view(torch.int32)  # four elements, a byte each
    return (bytes_ << _shifts(kind, mask.device)).sum(-1, dtype=torch.int32)


def _packets(counts: Tensor, per_packet: int = PACKET_VALUES) -> Tensor:
    return (counts + (per_packet - 1)) // per_packet


def _packet_order(packets: Tensor) -> Tensor:
    """For [strips, tiles, 32] packets a lane: which packet of the lane-by-lane order stands at each stored place.

    Stored are, tile by tile, first all lanes' first packets, then the second packets of the lanes that have one, and so
    on: a warp's loads are then contiguous.
    """
    flat = packets.flatten().long()
    first = (torch.cumsum(flat, 0) - flat).view(-1, 1, LANES)
    place = torch.arange(max(int(packets.max()), 1), device=packets.device).view(1, -1, 1)
    return (first + place)[place < packets.view(-1, 1, LANES)]


def _with_padding(mask: Tensor, counts: Tensor, per_packet: int) -> Tensor:
    """The mask with as many true places appended to each lane as its last packet has to spare."""
    spare = (-counts) % per_packet
    pad = torch.arange(per_packet, device=mask.device) < spare.unsqueeze(-1)
    return torch.cat([mask, pad], dim=-1)


def _select(lanes: Tensor, mask: Tensor, counts: Tensor, per_packet: int) -> Tensor:
    """All lanes' nonzeros, each lane's padded with zeros to whole packets."""
    padded = torch.nn.functional.pad(lanes, (0, per_packet))
    return padded.masked_select(_with_padding(mask, counts, per_packet))


def _spread(values: Tensor, mask: Tensor, counts: Tensor, per_packet: int) -> Tensor:
    """The inverse of :func:`_select`."""
    full = torch.zeros(*mask.shape[:-1], mask.shape[-1] + per_packet, dtype=torch.int16, device=mask.device)
    full.masked_scatter_(_with_padding(mask, counts, per_packet), values)
    return full[..., : mask.shape[-1]].contiguous()
