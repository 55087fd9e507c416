"""Shards for tensor parallelism: bit for bit what packing the slice gives, wherever the cut falls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_llm import PackedWeight
from sparse_matrices import DTYPES, PATTERNS, bits, sparse


def same(one: PackedWeight, other: PackedWeight) -> bool:
    tensors = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return one.metadata() == other.metadata() and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in tensors
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_shard_is_the_packed_slice(data: st.DataObject) -> None:
    dim, world = data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    share = data.draw(st.sampled_from([1, 16, 24, 32, 64, 72, 128, 192, 256, 320]) | st.integers(1, 400))
    other = data.draw(st.integers(1, 90))
    shape = (share * world, other) if dim == 0 else (other, share * world)
    dense = sparse(
        *shape,
        data.draw(st.sampled_from([0.0, 0.5, 0.7, 0.8, 1.0])),
        data.draw(st.sampled_from(DTYPES)),
        data.draw(st.integers(0, 2**31)),
        data.draw(st.sampled_from(PATTERNS)),
    )
    weight = PackedWeight.from_dense(dense)
    for rank in range(world):
        part = weight.shard(dim, rank, world).validate()
        assert same(part, PackedWeight.from_dense(dense.narrow(dim, rank * share, share)))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_of_another_tile_size_is_packed_anew(dim: int) -> None:
    """Half of the matrix is dense and takes small tiles, which the other half should not inherit."""
    weight = PackedWeight.from_dense(torch.cat([sparse(64, 1024, 0.0), sparse(64, 1024, 0.8)], dim))
    sizes = [weight.shard(dim, rank, 2).tile_words for rank in (0, 1)]
    assert sizes[0] == weight.tile_words < sizes[1]


def test_a_shard_keeps_nothing_of_the_whole_alive() -> None:
    weight = PackedWeight.from_dense(sparse(256, 512, 0.6))
    for dim in (0, 1):
        for tensor in weight.shard(dim, 1, 4).tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_shards_of_shards_are_shards() -> None:
    dense = sparse(96, 640, 0.7)
    quarter = PackedWeight.from_dense(dense).shard(0, 1, 2).shard(1, 0, 2)
    assert same(quarter, PackedWeight.from_dense(dense[48:, :320]))
    assert torch.equal(bits(quarter.to_dense()), bits(dense[48:, :320]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, 0, 2), "dim=2.*rows.*columns"),
        ((-1, 0, 2), "dim=-1"),
        ((0, 2, 2), "rank=2 of world_size=2"),
        ((0, -1, 2), "rank=-1"),
        ((0, 0, 0), "world_size=0"),
        ((0, 0, 7), "96 rows can't be shared equally by world_size=7"),
        ((1, 0, 7), "128 columns can't be shared"),
    ],
)
def test_impossible_shards_are_refused_in_words(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PackedWeight.from_dense(sparse(96, 128, 0.5)).shard(*arguments)


def test_the_shards_of_a_row_cut_join_to_the_whole() -> None:
    dense: Tensor = sparse(80, 100, 0.5)
    weight = PackedWeight.from_dense(dense)
    assert torch.equal(torch.cat([weight.shard(0, rank, 5).to_dense() for rank in range(5)]), dense)
    assert torch.equal(torch.cat([weight.shard(1, rank, 4).to_dense() for rank in range(4)], 1), dense)
