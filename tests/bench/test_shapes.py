"""Which weights are measured, and what the lists of the command line may hold."""

from __future__ import annotations

import pytest

from flash_llm.bench.shapes import SHAPES, parse_ns, parse_shapes, parse_sparsities

PAPER = """21504x7168 7168x7168 28672x7168 7168x28672 27648x9216 9216x9216 36864x9216 9216x36864
           36864x12288 12288x12288 49152x12288 12288x49152"""


def test_the_papers_twelve_shapes() -> None:
    assert [f"{rows}x{columns}" for rows, columns in parse_shapes("paper")] == PAPER.split()


@pytest.mark.parametrize("name", SHAPES)
def test_every_model_has_whole_shapes(name: str) -> None:
    shapes = parse_shapes(name)
    assert len(set(shapes)) == len(shapes)
    assert all(size % 64 == 0 for shape in shapes for size in shape)


def test_lists_keep_their_order_and_drop_repetitions() -> None:
    assert parse_shapes("8x16, llama-3-8b,8x16") == [(8, 16), *SHAPES["llama-3-8b"]]
    assert parse_sparsities("0.7,0,0.70") == [0.7, 0.0]
    assert parse_ns("64,1,64") == [64, 1]


@pytest.mark.parametrize("text", ["", "opt", "4096", "4096x", "0x8", "8x-1", "8x8x8", "8x8,,8x8", "1.5x2"])
def test_bad_shapes_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"shape '.*': give paper, .*ROWSxCOLUMNS"):
        parse_shapes(text)


@pytest.mark.parametrize("text", ["", "half", "1", "-0.1", "nan", "50", "0.5,,0.6"])
def test_bad_sparsities_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"sparsity '.*': it takes a number from 0"):
        parse_sparsities(text)


@pytest.mark.parametrize("text", ["", "0", "-8", "1.5", "all"])
def test_bad_ns_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"n '.*': it takes a number of rows of x"):
        parse_ns(text)
