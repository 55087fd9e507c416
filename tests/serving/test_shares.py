"""A rank's share of a layer, from the tensors of the files. Needs no vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_llm.errors import CheckpointError, FormatError, SlowPathWarning
from flash_llm.integrations.vllm.shares import Rank, Shares
from flash_llm.tensor import PackedWeight

CPU = torch.device("cpu")
PARTS = ("q_proj", "k_proj", "v_proj")


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator).half()
    return dense.masked_fill_(torch.rand(rows, columns, generator=generator) < 0.6, 0)


def shares(
    whole: list[torch.Tensor], rank: Rank, *, kv_heads: int = 4, by_columns: bool = False, **changes: Any
) -> Shares:
    """For parts of 16 rows a head; the second and third have ``kv_heads`` heads, each rank has one or more."""
    pieces = [rank.size] + [min(rank.size, kv_heads)] * (len(whole) - 1)
    rows = [w.shape[0] if by_columns else w.shape[0] // n for w, n in zip(whole, pieces, strict=True)]
    columns = whole[0].shape[1] // (rank.size if by_columns else 1)
    parts = PARTS[: len(whole)]
    metadata = {name: PackedWeight.from_dense(w).metadata() for name, w in zip(parts, whole, strict=True)}
    given = {"whole_rows": [w.shape[0] for w in whole], "metadata": metadata} | changes
    return Shares("qkv_proj", parts, rows, columns, rank=rank, device=CPU, **given)


def feed(target: Shares, part: int | None, weight: PackedWeight) -> None:
    for name, tensor in reversed(weight.tensors().items()):  # any order will do
        target.add(part, name, tensor)


def dense_of(share: PackedWeight | torch.Tensor) -> torch.Tensor:
    return share.to_dense() if isinstance(share, PackedWeight) else share


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_shares_of_merged_rows(size: int) -> None:
    whole = [matrix(128, 96, 1), matrix(64, 96, 2), matrix(64, 96, 3)]
    for number in range(size):
        target = shares(whole, Rank(number, size))
        for part in (2, 0, 1):
            feed(target, part, PackedWeight.from_dense(whole[part]))
        got = target.result()
        assert isinstance(got, PackedWeight)
        got.validate()
        assert torch.equal(got.to_dense(), torch.cat([w.chunk(size)[number] for w in whole]))


def test_key_and_value_heads_are_repeated_where_ranks_outnumber_them() -> None:
    whole = [matrix(128, 64, 1), matrix(32, 64, 2), matrix(32, 64, 3)]
    for number in range(4):
        target = shares(whole, Rank(number, 4), kv_heads=2)
        for part in range(3):
            feed(target, part, PackedWeight.from_dense(whole[part]))
        expected = torch.cat(
            [whole[0].chunk(4)[number], whole[1].chunk(2)[number // 2], whole[2].chunk(2)[number // 2]]
        )
        assert torch.equal(dense_of(target.result()), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_the_ranks_shares_of_columns(packed: bool) -> None:
    whole = matrix(48, 320)
    for number in range(2):
        target = shares([whole], Rank(number, 2), by_columns=True)
        if packed:
            feed(target, None, PackedWeight.from_dense(whole))
        else:
            target.add(None, "weight", whole)
        assert torch.equal(dense_of(target.result()), whole.chunk(2, dim=1)[number])


def test_a_dense_part_among_packed_ones_is_packed_and_the_placeholder_ignored() -> None:
    whole = [matrix(32, 64, 1), matrix(32, 64, 2), matrix(32, 64, 3)]
    target = shares(whole, Rank())
    feed(target, 0, PackedWeight.from_dense(whole[0]))
    target.add(0, "weight", torch.empty(0))
    target.add(1, "weight", whole[1])
    feed(target, 2, PackedWeight.from_dense(whole[2]))
    got = target.result()
    assert isinstance(got, PackedWeight)
    assert torch.equal(got.to_dense(), torch.cat(whole))


def test_a_layer_that_is_merged_in_the_files_is_taken_apart() -> None:
    whole = [matrix(32, 64, 1), matrix(16, 64, 2), matrix(16, 64, 3)]
    merged = PackedWeight.from_dense(torch.cat(whole))
    target = shares(whole, Rank(1, 2), metadata={"qkv_proj": merged.metadata()})
    feed(target, None, merged)
    assert torch.equal(dense_of(target.result()), torch.cat([w.chunk(2)[1] for w in whole]))


def test_a_share_does_not_keep_the_whole_in_memory() -> None:
    target = shares([matrix(64, 64)], Rank(0, 2))
    whole = matrix(64, 64)
    target.add(0, "weight", whole)
    share = target.result()
    assert isinstance(share, torch.Tensor)
    assert share.untyped_storage().nbytes() == whole.nbytes // 2


def test_what_is_missing_twice_or_damaged_is_named() -> None:
    whole = [matrix(32, 64, 1), matrix(32, 64, 2)]
    weight = PackedWeight.from_dense(whole[0])
    target = shares(whole, Rank())
    feed(target, 0, weight)
    with pytest.raises(CheckpointError, match="lack k_proj, which qkv_proj needs"):
        target.result()
    with pytest.raises(CheckpointError, match="hold q_proj twice"):
        feed(target, 0, weight)
    broken = weight.values.clone()
    broken[3] += 1
    target.add(1, "values", broken)
    target.add(1, "bitmap", weight.bitmap)
    with pytest.raises(FormatError, match=r"k_proj: .*damaged"):
        target.add(1, "offsets", weight.offsets)


def test_sizes_that_do_not_divide_are_refused() -> None:
    whole = [matrix(32, 64)]
    target = shares(whole, Rank(0, 3))
    with pytest.raises(CheckpointError, match=r"q_proj has 32 rows, of which each of 3 ranks would have 10"):
        feed(target, 0, PackedWeight.from_dense(whole[0]))


@pytest.mark.parametrize("values", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_shares_of_8_bit_parts_have_the_bytes_of_the_files(values: str, by_columns: bool) -> None:
    whole = [matrix(64, 96, 1)] if by_columns else [matrix(64, 96, 1), matrix(32, 96, 2), matrix(32, 96, 3)]
    packed = [PackedWeight.from_dense(part, values=values) for part in whole]
    metadata = {name: part.metadata() for name, part in zip(PARTS, packed, strict=False)}
    for number in range(2):
        target = shares(whole, Rank(number, 2), by_columns=by_columns, metadata=metadata)
        for place, part in enumerate(packed):
            feed(target, place, part)
        got = target.result()
        assert isinstance(got, PackedWeight)
        assert got.validate().kind.value == values
        expected = torch.cat([part.to_dense().chunk(2, int(by_columns))[number] for part in packed])
        assert torch.equal(got.to_dense(), expected)


def test_parts_of_8_and_of_16_bits_are_held_in_16_and_that_is_said() -> None:
    whole = [matrix(64, 96, 1), matrix(32, 96, 2), matrix(32, 96, 3)]
    first = PackedWeight.from_dense(whole[0], values="int8")
    target = shares(whole, Rank(), metadata={"q_proj": first.metadata()})
    feed(target, 0, first)
    target.add(1, "weight", whole[1])
    target.add(2, "weight", whole[2])
    with pytest.warns(SlowPathWarning, match="qkv_proj: some of q_proj, k_proj, v_proj have 8-bit values"):
        got = target.result()
    assert torch.equal(dense_of(got), torch.cat([first.to_dense(), *whole[1:]]))
