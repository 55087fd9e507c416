"""The example in docs/format.md is what packing does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from flash_llm import PackedWeight

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"


def test_the_worked_example() -> None:
    matrix, packed = re.findall(r"```(?:json)?\n(.*?)```", PAGE.read_text(), re.DOTALL)
    dense = torch.tensor([[float(x) for x in line.split()] for line in matrix.splitlines()]).half()
    expected = json.loads(packed)
    weight = PackedWeight.from_dense(dense, tile_words=1)
    lanes = {str(lane): f"{word & 0xFFFFFFFF:#010x}" for lane, word in enumerate(weight.bitmap[0, 0].tolist()) if word}
    assert lanes == expected["bitmap"]
    assert weight.values.tolist() == expected["values"]
    assert weight.offsets.tolist() == expected["offsets"]
