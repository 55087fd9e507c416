"""The weight shapes, (rows, columns), that kernels are measured on."""

from __future__ import annotations

SHAPES: dict[str, list[tuple[int, int]]] = {
    # OPT-30B, 66B and 175B: QKV, output projection, and the two of the MLP. The Flash-LLM paper's shapes.
    "paper": [
        (width * rows, width * columns)
        for width in (7168, 9216, 12288)
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4))
    ],
    "llama-3-8b": [(4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096)],
    "llama-3-70b": [(8192, 8192), (28672, 8192), (8192, 28672), (10240, 8192)],
    "qwen2.5-7b": [(3584, 3584), (18944, 3584), (3584, 18944), (4608, 3584)],
    "qwen2.5-72b": [(8192, 8192), (29568, 8192), (8192, 29568), (10240, 8192)],
}


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Shapes from a name of SHAPES or a list such as "4096x4096,14336x4096".

    Raises:
        ValueError: neither of them.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        shapes = [(int(rows), int(columns)) for rows, columns in (item.split("x") for item in text.split(","))]
    except ValueError:
        shapes = []
    if not shapes or any(size < 1 for shape in shapes for size in shape):
        raise ValueError(f"shapes {text!r}: give one of {', '.join(SHAPES)}, or a list such as 4096x4096,14336x4096")
    return shapes
