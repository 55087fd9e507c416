"""What kernels are measured on: the shapes of real models' weights, (rows, columns), and lists from a command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Shape = tuple[int, int]
Number = TypeVar("Number", int, float)

SHAPES: dict[str, list[Shape]] = {
    # OPT-30B, 66B and 175B: QKV, output projection, and the two of the MLP. The Flash-LLM paper's shapes.
    "paper": [
        (width * rows, width * columns)
        for width in (7168, 9216, 12288)
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4))
    ],
    # A small one, and the two of OPT-30B's MLP: for measuring over many numbers of rows of x.
    "sweep": [(4096, 4096), (28672, 7168), (7168, 28672)],
    "llama-3-8b": [(4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096)],
    "llama-3-70b": [(8192, 8192), (28672, 8192), (8192, 28672), (10240, 8192)],
    "qwen2.5-7b": [(3584, 3584), (18944, 3584), (3584, 18944), (4608, 3584)],
    "qwen2.5-72b": [(8192, 8192), (29568, 8192), (8192, 29568), (10240, 8192)],
}

N_SWEEP = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
"""Rows of x from a single token to a long prompt: where kernels change, and between."""


def parse_shapes(text: str) -> list[Shape]:
    """Shapes from names of SHAPES and single shapes: "paper", "4096x4096,14336x4096", "llama-3-8b,8192x8192".

    Raises:
        ValueError: an item is neither.
    """
    shapes = [shape for item in text.split(",") for shape in SHAPES.get(item.strip()) or [_shape(item)]]
    return list(dict.fromkeys(shapes))


def _shape(item: str) -> Shape:
    try:
        rows, columns = map(int, item.split("x"))
    except ValueError:
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise ValueError(
            f"shape {item!r}: give {', '.join(SHAPES)}, or ROWSxCOLUMNS of at least 1 each, such as 4096x14336"
        )
    return rows, columns


def parse_sparsities(text: str) -> list[float]:
    """Shares of zeros from "0.5,0.6".

    Raises:
        ValueError: an item is no number from 0 up to, not including, 1.
    """
    return _numbers(text, float, lambda value: 0 <= value < 1, "sparsity", "a number from 0 up to, not including, 1")


def parse_ns(text: str) -> list[int]:
    """Numbers of rows of x from "1,8,64".

    Raises:
        ValueError: an item is no positive integer.
    """
    return _numbers(text, int, lambda value: value >= 1, "n", "a number of rows of x, an integer of at least 1")


def _numbers(
    text: str, kind: Callable[[str], Number], allowed: Callable[[Number], bool], name: str, rule: str
) -> list[Number]:
    values: list[Number] = []
    for item in text.split(","):
        try:
            value = kind(item)
        except ValueError:
            raise ValueError(f"{name} {item!r}: it takes {rule}; several are parted by commas") from None
        if not allowed(value):
            raise ValueError(f"{name} {item!r}: it takes {rule}")
        values.append(value)
    return list(dict.fromkeys(values))
