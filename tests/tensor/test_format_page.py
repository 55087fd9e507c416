"""docs/format.md: its example is what packing does, and its reader reads what packing wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from torch import Tensor

from flash_llm import PackedWeight
from flash_llm.tensor import layout
from sparse_matrices import bits, matrices, without_negative_zero

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def block(language: str) -> str:
    """The page's only block of that language."""
    (found,) = (text for kind, text in BLOCKS if kind == language)
    return found


def read(weight: PackedWeight) -> Tensor:
    """By the page's own reader, on the values' bits."""
    names: dict[str, Any] = {}
    exec(block("python"), names)
    bitmap, values = (weight.bitmap.long() & 0xFFFFFFFF).tolist(), bits(weight.values).tolist()
    rows = names["read"](weight.shape, weight.tile_words, bitmap, values, weight.offsets.tolist())
    return torch.tensor(rows, dtype=torch.int16)


def test_the_worked_example() -> None:
    dense = torch.tensor([[float(x) for x in line.split()] for line in block("").splitlines()]).half()
    expected = json.loads(block("json"))
    weight = PackedWeight.from_dense(dense, tile_words=expected["metadata"]["tile_words"])
    lanes = {str(lane): f"{word & 0xFFFFFFFF:#010x}" for lane, word in enumerate(weight.bitmap[0, 0].tolist()) if word}
    assert lanes == expected["bitmap"]
    assert weight.values.tolist() == expected["values"]
    assert weight.offsets.tolist() == expected["offsets"]
    assert weight.metadata() == expected["metadata"]
    assert torch.equal(read(weight), bits(dense))


@settings(deadline=None, max_examples=20)
@given(matrices(max_rows=40, max_columns=400))
def test_the_reader_reads_any_matrix(dense: Tensor) -> None:
    assert torch.equal(read(PackedWeight.from_dense(dense)), bits(without_negative_zero(dense)))


@settings(deadline=None, max_examples=30)
@given(matrices(max_rows=40, max_columns=400))
def test_the_checksum_is_the_formula_of_the_page(dense: Tensor) -> None:
    weight = PackedWeight.from_dense(dense)

    def c(tensor: Tensor) -> int:
        words = tensor.view(torch.int32).flatten().tolist()
        return tensor.nbytes + sum((2 * i + 1) * word for i, word in enumerate(words))

    rows, columns = weight.shape
    total = c(weight.bitmap) + 3 * c(weight.values) + 5 * c(weight.offsets)
    total += 7 * rows + 9 * columns + 11 * weight.tile_words + 13 * int(weight.dtype == torch.bfloat16)
    assert weight.metadata()["checksum"] == f"{total % 2**64:016x}"


def test_the_page_names_the_layouts_numbers() -> None:
    assert f"# The packed format, version {layout.FORMAT_VERSION}\n" in PAGE
    sizes = ", ".join(map(str, layout.TILE_WORDS[:-1])) + f" or {layout.TILE_WORDS[-1]}"
    assert f"{sizes}. There are" in PAGE
    assert f"at most {layout.LANE_CAPACITY} nonzeros" in PAGE
    for field in PackedWeight.from_dense(torch.ones(1, 1).half()).metadata():
        assert f"| `{field}` |" in PAGE
