"""docs/format.md: its example is what packing does, and its reader reads what packing wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_llm import PackedWeight
from flash_llm.tensor import layout
from sparse_matrices import bits, matrices, without_negative_zero

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    """The page's blocks of that language."""
    return [text for kind, text in BLOCKS if kind == language]


def reader() -> Any:
    """The page's own."""
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    return names["read"]


def read(weight: PackedWeight) -> Tensor:
    """By the page's reader, on the values' bits."""
    bitmap, values = (weight.bitmap.long() & 0xFFFFFFFF).tolist(), bits(weight.values).tolist()
    rows = reader()(weight.shape, weight.tile_words, bitmap, values, weight.offsets.tolist())
    return torch.tensor(rows, dtype=torch.int16)


def read_8_bits(weight: PackedWeight) -> Tensor:
    """By the page's reader, on the values' numbers, and with the scales as the page says."""
    assert weight.scales is not None
    bitmap, values = (weight.bitmap.long() & 0xFFFFFFFF).tolist(), weight.values.float().tolist()
    rows = reader()(weight.shape, weight.tile_words, bitmap, values, weight.offsets.tolist(), packet=16)
    return (torch.tensor(rows) * weight.scales[:, None]).to(weight.dtype)


@pytest.mark.parametrize("number", [0, 1], ids=["16 bits", "8 bits"])
def test_the_worked_example(number: int) -> None:
    dense = torch.tensor([[float(x) for x in line.split()] for line in blocks("")[0].splitlines()]).half()
    expected = json.loads(blocks("json")[number])
    weight = PackedWeight.from_dense(
        dense,
        tile_words=expected["metadata"]["tile_words"],
        values=expected["metadata"].get("values", "16-bit"),
        scales=torch.tensor(expected["scales"]) if "scales" in expected else None,
    )
    lanes = {str(lane): f"{word & 0xFFFFFFFF:#010x}" for lane, word in enumerate(weight.bitmap[0, 0].tolist()) if word}
    assert lanes == expected["bitmap"]
    if weight.scales is None:
        assert weight.values.tolist() == expected["values"]
    else:
        assert weight.values.view(torch.uint8).tolist() == [int(str(byte), 0) for byte in expected["values"]]
    assert weight.offsets.tolist() == expected["offsets"]
    assert weight.metadata() == expected["metadata"]
    found = read(weight).view(torch.float16) if weight.scales is None else read_8_bits(weight)
    assert torch.equal(found, dense)


@settings(deadline=None, max_examples=20)
@given(matrices(max_rows=40, max_columns=400))
def test_the_reader_reads_any_matrix(dense: Tensor) -> None:
    assert torch.equal(read(PackedWeight.from_dense(dense)), bits(without_negative_zero(dense)))
    if bool(dense.isfinite().all()):
        for kind in ("float8_e4m3", "int8"):
            weight = PackedWeight.from_dense(dense, values=kind)
            assert torch.equal(read_8_bits(weight), weight.to_dense())


def test_the_bytes_of_a_float8_are_what_the_page_says() -> None:
    for byte in set(range(256)) - {0x7F, 0xFF}:
        e, f = byte >> 3 & 15, byte & 7
        number = 2.0 ** (e - 7) * (1 + f / 8) if e else 2.0**-6 * (f / 8)
        stored = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert float(stored) == (-number if byte >> 7 else number)


@settings(deadline=None, max_examples=30)
@given(matrices(max_rows=40, max_columns=400), st.sampled_from(["16-bit", "float8_e4m3", "int8"]))
def test_the_checksum_is_the_formula_of_the_page(dense: Tensor, values: str) -> None:
    dense = dense if values == "16-bit" else dense.nan_to_num()
    weight = PackedWeight.from_dense(dense, values=values)

    def c(tensor: Tensor) -> int:
        words = tensor.view(torch.int32).flatten().tolist()
        return tensor.nbytes + sum((2 * i + 1) * word for i, word in enumerate(words))

    rows, columns = weight.shape
    total = c(weight.bitmap) + 3 * c(weight.values) + 5 * c(weight.offsets)
    total += 7 * rows + 9 * columns + 11 * weight.tile_words + 13 * int(weight.dtype == torch.bfloat16)
    if weight.scales is not None:
        total += 15 * c(weight.scales) + 17 * {"float8_e4m3": 1, "int8": 2}[values]
    assert weight.metadata()["checksum"] == f"{total % 2**64:016x}"


def test_the_page_names_the_layouts_numbers() -> None:
    assert f"# The packed format, versions 1 and {layout.FORMAT_VERSION}\n" in PAGE
    sizes = ", ".join(map(str, layout.TILE_WORDS[:-1])) + f" or {layout.TILE_WORDS[-1]}"
    assert f"{sizes}. There are" in PAGE
    assert f"at most {layout.LANE_CAPACITY} nonzeros" in PAGE
    for field in PackedWeight.from_dense(torch.ones(1, 1).half(), values="int8").metadata():
        assert f"| `{field}` |" in PAGE
