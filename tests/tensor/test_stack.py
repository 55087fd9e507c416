"""Stacking packed weights, and random ones."""

from __future__ import annotations

import pytest
import torch

from flash_llm.tensor import PackedWeight
from flash_llm.tensor.dummy import random_packed
from flash_llm.tensor.stack import stack


def sparse(rows: int, columns: int, sparsity: float = 0.7, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    return dense.masked_fill_(torch.rand(rows, columns, generator=generator) < sparsity, 0)


# Whole strips; a part that ends within a strip; tile sizes that differ; a last part that ends within a strip.
@pytest.mark.parametrize("sizes", [(64, 64, 64), (24, 16), (1024, 16, 48), (32, 7)])
@pytest.mark.parametrize("columns", [512, 200])
def test_a_stack_is_what_packing_the_stacked_matrix_gives(sizes: tuple[int, ...], columns: int) -> None:
    dense = [sparse(rows, columns, 0.5 + 0.1 * i) for i, rows in enumerate(sizes)]
    stacked = stack([PackedWeight.from_dense(part) for part in dense]).validate()
    expected = PackedWeight.from_dense(torch.cat(dense))
    assert (stacked.shape, stacked.tile_words, stacked.max_packets) == (
        expected.shape,
        expected.tile_words,
        expected.max_packets,
    )
    for name, tensor in expected.tensors().items():
        assert torch.equal(stacked.tensors()[name], tensor), name


def test_weights_that_differ_are_not_stacked() -> None:
    with pytest.raises(ValueError, match="nothing to stack"):
        stack([])
    with pytest.raises(ValueError, match="different dtype, value kind, width or device"):
        stack([PackedWeight.from_dense(sparse(16, 64)), PackedWeight.from_dense(sparse(16, 128))])


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(256, 512), (50, 70), (16, 64)])
def test_a_random_weight_is_a_valid_one(shape: tuple[int, int], sparsity: float) -> None:
    weight = random_packed(*shape, sparsity, torch.bfloat16, "cpu", torch.Generator().manual_seed(0)).validate()
    assert (weight.shape, weight.dtype) == (shape, torch.bfloat16)
    assert weight.sparsity == pytest.approx(sparsity, abs=0.05)
    dense = weight.to_dense()
    assert int(dense.count_nonzero()) == pytest.approx(weight.nnz, rel=0.01)  # chance may draw a value of 0
    assert PackedWeight.from_dense(dense).tile_words == weight.tile_words


def test_random_weights_follow_their_generator() -> None:
    first, again, other = (
        random_packed(64, 64, 0.6, torch.float16, "cpu", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.to_dense(), again.to_dense())
    assert not torch.equal(first.to_dense(), other.to_dense())


@pytest.mark.parametrize(("sparsity", "error"), [(1.0, ValueError), (-0.1, ValueError)])
def test_random_weights_refuse_what_makes_no_sense(sparsity: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="from 0 up to"):
        random_packed(16, 64, sparsity, torch.float16, "cpu")
    with pytest.raises(TypeError, match="float32"):
        random_packed(16, 64, 0.5, torch.float32, "cpu")
