"""No warp waits for global memory in the middle of a tile: read off the machine code, as the compiler decides that."""

from __future__ import annotations

from itertools import product

import pytest
from waits import chosen, compiled, find_nvdisasm, waits

from flash_llm.kernels import plan
from flash_llm.tensor.layout import ValueKind

pytest.importorskip("cuda.core", reason="cuda-core isn't installed: pip install 'flash-llm[cuda]'")
pytestmark = pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")

TILES = ((4, 0.6), (6, 0.7), (8, 0.8), (12, 0.9))  # words, and zeros at which that size is usual
SHAPES = ((28672, 7168), (36864, 9216), (4096, 4096))  # 6 and 12 words divide the second's rows alone


def found(shape: tuple[int, int], sparsity: float, tile_words: int, n: int, values: ValueKind) -> list[str]:
    nvdisasm = find_nvdisasm()
    assert nvdisasm is not None
    made: plan.SpmmPlan = chosen(shape, sparsity, tile_words, n, values)
    instructions = compiled(made, nvdisasm)
    assert any(one.loads_packets for one in instructions), "these are what is waited for"
    assert any(one.multiplies for one in instructions)
    return waits(instructions)


@pytest.mark.parametrize("n", [8, 64, 128])
@pytest.mark.parametrize(("shape", "tile"), [*product(SHAPES, TILES)])
def test_packets_are_waited_for_where_they_are_stored(shape: tuple[int, int], tile: tuple[int, float], n: int) -> None:
    """28672 x 7168 in tiles of 6 words once waited with 64 rows of x: 12 % of the time."""
    assert found(shape, tile[1], tile[0], n, ValueKind.BITS16) == []


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("values", [ValueKind.E4M3, ValueKind.INT8])
def test_so_are_packets_of_8_bit_values(values: ValueKind, n: int) -> None:
    assert found((28672, 7168), 0.6, 4, n, values) == []
