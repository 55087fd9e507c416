"""The plan is a pure function, and what it plans fits the device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_llm.kernels import plan
from flash_llm.tensor.layout import LANE_CAPACITY, PACKET_VALUES, TILE_WORDS, ceil_div, grid

DEVICES = [
    plan.Device((8, 0), 108, 166912),
    plan.Device((8, 9), 128, 101376),
    plan.Device((9, 0), 132, 232448),
    plan.Device((12, 0), 170, 101376),
]


@given(
    device=st.sampled_from(DEVICES),
    rows=st.integers(1, 60000),
    columns=st.integers(1, 60000),
    tile_words=st.sampled_from(TILE_WORDS),
    fill=st.floats(0, 1),
    n=st.integers(1, plan.MAX_N),
)
def test_it_fits_the_device(device: plan.Device, rows: int, columns: int, tile_words: int, fill: float, n: int) -> None:
    strips, _, tiles = grid(rows, columns, tile_words)
    most = int(fill * min(LANE_CAPACITY, 32 * tile_words)) // PACKET_VALUES
    packets = strips * tiles * 32 * most
    chosen = plan.spmm_plan(device, rows, columns, packets, most, tile_words, n, bf16=False)
    defines = dict(chosen.defines)
    assert chosen.shared + 64 <= device.shared_memory
    assert chosen.threads <= 1024
    assert defines["WARPS"] % 4 == 0
    assert chosen.row_blocks == ceil_div(strips, defines["WARPS"])
    assert chosen.units == chosen.row_blocks * tiles
    assert 1 <= chosen.blocks <= min(device.multiprocessors, chosen.units)
    assert 8 * defines["N_BLOCKS"] >= n
    assert 1 <= defines["LIKELY_FULL"] <= defines["PACKETS_AHEAD"] <= max(1, most)


@pytest.mark.parametrize("n", [0, plan.MAX_N + 1])
def test_more_rows_than_a_launch_takes_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}"):
        plan.spmm_plan(DEVICES[0], 64, 64, 1, 1, 1, n, bf16=False)


@pytest.mark.parametrize("warps", [4, 8, 12, 16])
def test_registers_asked_for_are_there(warps: int) -> None:
    """A block that asks for more than it began with waits for ever."""
    threads = (warps + plan.FETCH_WARPS) * 32
    began_with = min(255, 65536 // threads) // 8 * 8 * threads
    assert warps * 32 * plan.multiplying_registers(warps) + plan.FETCH_WARPS * 32 * 24 <= began_with
