"""Plans: pure arithmetic, and within what each GPU has, whatever the weight."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import DEVICES
from flash_llm.kernels import plan
from flash_llm.tensor import ValueKind
from flash_llm.tensor.layout import LANE_CAPACITY, LANES, TILE_WORDS, WORD_BITS, grid

Weight = tuple[int, int, int, int, int]

KINDS = st.sampled_from(ValueKind)


@st.composite
def weights(draw: st.DrawFn, kinds: st.SearchStrategy[ValueKind] = KINDS) -> tuple[Weight, ValueKind]:
    """(rows, columns, packets, max_packets, tile_words) and value kind as some packed weight has them."""
    kind = draw(kinds)
    rows, columns = draw(st.integers(1, 60_000)), draw(st.integers(1, 60_000))
    tile_words = draw(st.sampled_from(TILE_WORDS))
    most = LANE_CAPACITY // kind.packet_values
    max_packets = draw(st.integers(0, min(most, -(-WORD_BITS * tile_words // kind.packet_values))))
    strips, _, tiles = grid(rows, columns, tile_words)
    share = draw(st.floats(0, 1))
    packets = max(int(share * max_packets * strips * tiles * LANES), max_packets)
    return (rows, columns, packets, max_packets, tile_words), kind


@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_what_is_expanded_at_a_time_fits_a_workspace_unless_it_has_few_rows(rows: int, columns: int) -> None:
    part = plan.rows_unpacked(rows, columns)
    assert part % 16 == 0
    strips = 16 * columns * 2
    assert part * columns * 2 <= plan._WORKSPACE_BYTES + strips or part < 2 * plan._WORKSPACE_ROWS + 16
    assert part >= min(rows, plan._WORKSPACE_ROWS)
    if 2 * rows * columns <= plan._WORKSPACE_BYTES:
        assert part >= rows, "and what fits is expanded at once"


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(DEVICES)), weights(), st.integers(1, 600), st.booleans())
def test_a_plan_fits_the_device_and_covers_the_matrix(
    name: str, packed: tuple[Weight, ValueKind], n: int, bf16: bool
) -> None:
    device, (weight, kind) = DEVICES[name], packed
    rows, columns, _, max_packets, tile_words = weight
    chosen = plan.spmm_plan(device, *weight, n, bf16, values=kind)
    assert chosen == plan.spmm_plan(device, *weight, n, bf16, values=kind)
    defines = dict(chosen.defines)
    warps, n_blocks = defines["WARPS"], defines["N_BLOCKS"]
    strips, words, tiles = grid(rows, columns, tile_words)

    assert warps % 4 == 0
    assert LANES * warps <= chosen.threads <= 1024
    assert chosen.threads % (4 * LANES) == 0
    resident = defines.get("RESIDENT", 1)
    reserved = 1024  # of each block, by CUDA itself
    assert resident * (chosen.shared + plan._STATIC_BYTES + reserved) <= device.shared_memory + reserved

    assert (chosen.row_blocks - 1) * warps < strips <= chosen.row_blocks * warps
    passes = -(-n // (8 * n_blocks))
    assert chosen.units == passes * chosen.row_blocks * tiles
    assert chosen.counters == passes * chosen.row_blocks * warps
    assert 1 <= chosen.blocks <= min(chosen.units, device.multiprocessors * resident)
    assert n_blocks == 1 or 8 * n_blocks < 2 * n + 8, "no more blocks of n than some part of n needs"

    assert defines["TILE_WORDS"] == tile_words
    assert 1 <= defines["CHUNK_WORDS"] <= tile_words
    assert defines["RAGGED"] == words % tile_words
    assert defines["BF16"] == bf16
    assert 1 <= defines["LIKELY_FULL"] <= defines["PACKETS_AHEAD"] <= max(max_packets, 1)
    # A lane's column: all its packets and one word more, in every lane's own bank.
    assert chosen.column_bytes == (kind.packet_values * max(max_packets, 1) + 1) * 4 * LANES
    assert chosen.partial_floats == 2 * chosen.blocks * n_blocks * 4 * warps * LANES
    assert (chosen.source == "spmm_sm90.cu") == (device.capability == (9, 0))
    large = strips * words >= plan._X8_WORDS * device.multiprocessors
    assert chosen.splits_x == (device.capability == (9, 0) and kind is not ValueKind.BITS16 and n <= 32 and large)


@pytest.mark.parametrize("values", [ValueKind.E4M3, ValueKind.INT8])
def test_8_bit_values_take_half_the_packets_and_the_same_columns(values: ValueKind) -> None:
    """A packet has twice the values: as many registers hold twice as much ahead, and a column has as many words."""
    strips, _, tiles = grid(14336, 14336, 5)
    lanes = strips * tiles * LANES
    of_16 = plan.spmm_plan(DEVICES["H100"], 14336, 14336, int(8.5 * lanes), 12, 5, 8, False)
    of_8 = plan.spmm_plan(DEVICES["H100"], 14336, 14336, int(4.5 * lanes), 6, 5, 8, False, values=values)
    assert of_8.column_bytes == of_16.column_bytes
    assert dict(of_8.defines)["VALUES"] == values.code
    assert dict(of_8.defines)["LIKELY_FULL"] == 3
    assert dict(of_8.defines)["PACKETS_AHEAD"] == 6


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(sorted(DEVICES)), weights(), st.integers(1, 600), st.floats(0, 1))
def test_every_unit_has_one_block_and_every_block_knows_which(
    name: str, packed: tuple[Weight, ValueKind], n: int, place: float
) -> None:
    """The kernel's own arithmetic: where a block's units begin, and which block has a unit."""
    check_dealing(plan.spmm_plan(DEVICES[name], *packed[0], n, False, values=packed[1]), place)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 1000), st.floats(0, 1))
def test_a_last_row_block_with_few_rows_is_dealt_out_in_larger_shares(
    row_blocks: int, more: int, words: int, place: float
) -> None:
    rows, columns = (row_blocks * 12 + more) * 16, words * 64
    strips, _, tiles = grid(rows, columns, 8)
    weight = (rows, columns, 7 * strips * tiles * LANES, 9, 8)
    chosen = plan.spmm_plan(DEVICES["H100"], *weight, 64, False, n_blocks=8, warps=12, resident=1)
    check_dealing(chosen, place)
    edges = edges_of(chosen)
    most = max(min(end, chosen.whole) - begin for begin, end in pairwise(edges) if begin < chosen.whole)
    assert most <= -(-chosen.counted // chosen.blocks) <= -(-chosen.units // chosen.blocks)


def test_only_sparse_weights_have_lighter_row_blocks() -> None:
    """7168 rows are 37 row blocks and a third: 16 tiles a block in place of 17, at 80 % zeros."""
    strips, _, tiles = grid(7168, 28672, 8)
    at_80, at_60 = (
        plan.spmm_plan(DEVICES["H100"], 7168, 28672, packets * strips * tiles * LANES, 14, 8, 64, False)
        for packets in (7, 13)
    )
    assert (at_80.units, at_80.whole) == (38 * tiles, 37 * tiles)
    assert at_60.whole == at_60.units
    longest = {
        chosen: max(b - a for a, b in pairwise(edges_of(chosen)) if b <= chosen.whole) for chosen in (at_80, at_60)
    }
    assert (longest[at_80], longest[at_60]) == (16, 17)


@pytest.mark.parametrize("tile_words", TILE_WORDS)
@pytest.mark.parametrize("n", [8, 16, 32, 48, 64, 96, 128, 256])
def test_rings_hold_whole_tiles_where_they_can(tile_words: int, n: int) -> None:
    strips, _, tiles = grid(28672, 7168, tile_words)
    chosen = plan.spmm_plan(DEVICES["H100"], 28672, 7168, 5 * strips * tiles * LANES, 7, tile_words, n, False)
    defines = dict(chosen.defines)
    pieces = -(-tile_words // defines["CHUNK_WORDS"])
    assert 2 <= defines["STAGES"] <= 8
    assert defines["STAGES"] % pieces == 0 or defines["STAGES"] - defines["STAGES"] % pieces < plan._LEAST_STAGES


def edges_of(chosen: plan.SpmmPlan) -> list[int]:
    return [first_unit(chosen, block) for block in range(chosen.blocks + 1)]


def check_dealing(chosen: plan.SpmmPlan, place: float) -> None:
    edges = edges_of(chosen)
    assert (edges[0], edges[-1]) == (0, chosen.units)
    assert all(begin < end for begin, end in pairwise(edges)), "every block has work"
    unit = min(int(place * chosen.units), chosen.units - 1)
    block = block_of_unit(chosen, unit)
    assert edges[block] <= unit < edges[block + 1]


def first_unit(chosen: plan.SpmmPlan, block: int) -> int:
    """As ``csrc/spmm.cuh`` has it."""
    counted = block * chosen.share + min(block, chosen.larger) - max(0, block - chosen.late)
    if counted <= chosen.whole:
        return counted
    return min(chosen.units, chosen.whole + (counted - chosen.whole) * 3 // 2)


def block_of_unit(chosen: plan.SpmmPlan, unit: int) -> int:
    """As ``csrc/spmm.cuh`` has it."""
    share = chosen.share
    counted = unit if unit < chosen.whole else chosen.whole + ((unit - chosen.whole) * 2 + 1) // 3
    of_larger, before_late = chosen.larger * (share + 1), chosen.late * share + chosen.larger
    if counted < of_larger:
        return counted // (share + 1)
    if counted < before_late:
        return chosen.larger + (counted - of_larger) // share
    return chosen.late + (counted - before_late) // max(1, share - 1)


@pytest.mark.parametrize("n", [0, -1])
def test_no_rows_of_x_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n={n}.*at least 1"):
        plan.spmm_plan(DEVICES["H100"], 128, 128, 64, 2, 2, n, False)


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("warps", [4, 8, 12, 16])
def test_registers_of_the_hopper_kernel_add_up(warps: int, resident: int) -> None:
    """Multiplying and fetching warps together take no more than the block begins with, in the steps that PTX knows."""
    threads = (warps + plan.FETCH_WARPS) * LANES
    begins_with = min(255, 65536 // threads // resident) // 8 * 8
    registers = plan.multiplying_registers(warps, resident)
    fetching = plan.FETCH_WARPS * LANES * plan._FETCH_REGISTERS
    assert registers % 8 == 0
    assert begins_with <= registers <= 248, "registers are only ever added"
    assert registers * warps * LANES + fetching <= begins_with * threads


@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (5120, 5120), (6144, 4096)])
def test_small_weights_get_small_blocks_on_hopper(rows: int, columns: int) -> None:
    """They share the work more evenly, and the next kernel's begin while this one's still work."""
    strips, _, tiles = grid(rows, columns, 6)
    chosen = plan.spmm_plan(DEVICES["H100"], rows, columns, strips * tiles * LANES * 8, 10, 6, 8, False)
    assert dict(chosen.defines)["RESIDENT"] > 1
    large = plan.spmm_plan(DEVICES["H100"], 9 * rows, columns, 9 * strips * tiles * LANES * 8, 10, 6, 8, False)
    assert (dict(large.defines)["RESIDENT"], dict(large.defines)["WARPS"]) == (1, 12)
