"""8-bit values: rounded to the nearest with a scale for each row, and packed, cut and stacked like 16-bit ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_llm import PackedWeight
from flash_llm.tensor import ValueKind, layout
from flash_llm.tensor.dummy import random_packed
from flash_llm.tensor.quantise import choose_scales, dequantise, quantise
from flash_llm.tensor.stack import stack
from slow_packing import slow_pack
from sparse_matrices import DTYPES, PATTERNS, bits, sparse

KINDS = [ValueKind.E4M3, ValueKind.INT8]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Finite matrices of any shape, sparsity and pattern, with rows of very different size."""
    rows, columns = draw(st.integers(1, 70)), draw(st.sampled_from([1, 63, 64, 65, 1024]) | st.integers(1, 700))
    sparsity = draw(st.sampled_from([0.0, 0.5, 0.8, 1.0]) | st.floats(0, 1))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    dense = sparse(rows, columns, sparsity, torch.float32, seed, draw(st.sampled_from(PATTERNS)))
    size = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed)).mul(2).exp()
    return (dense * size).to(dtype)


def same(one: PackedWeight, other: PackedWeight) -> bool:
    """Equal in every bit."""
    tensors = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return one.metadata() == other.metadata() and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in tensors
    )


@settings(deadline=None, max_examples=60)
@given(matrices(), st.sampled_from(KINDS), st.sampled_from([None, 1, 2, 4]))
def test_the_tensors_are_what_the_layout_says(dense: Tensor, kind: ValueKind, tile_words: int | None) -> None:
    try:
        weight = PackedWeight.from_dense(dense, values=kind, tile_words=tile_words).validate()
    except ValueError:  # too many nonzeros for so large a tile
        weight = PackedWeight.from_dense(dense, values=kind)
    assert weight.scales is not None
    stored = quantise(dense, weight.scales, kind)
    bitmap, values, offsets = slow_pack(dense, weight.tile_words, stored)
    assert (weight.bitmap.long() & 0xFFFFFFFF).tolist() == bitmap
    assert weight.values.view(torch.uint8).tolist() == values
    assert weight.offsets.tolist() == offsets
    assert 16 * weight.max_packets <= layout.LANE_CAPACITY
    assert weight.nnz == int(dense.count_nonzero())
    assert torch.equal(weight.to_dense(), dequantise(stored, weight.scales, kind, dense.dtype))


@settings(deadline=None, max_examples=60)
@given(matrices(), st.sampled_from(KINDS))
def test_it_comes_back_rounded_to_the_nearest(dense: Tensor, kind: ValueKind) -> None:
    """By half a step: of a float8 relative to the value down to 2**-6, and absolute below; clipped at the largest."""
    weight = PackedWeight.from_dense(dense, values=kind)
    assert weight.scales is not None
    back, scales = weight.to_dense(torch.float32), weight.scales[:, None]
    wanted = dense.float().clamp(-kind.largest * scales, kind.largest * scales)
    half = (wanted.abs() / 16).maximum(scales * 2**-10) if kind is ValueKind.E4M3 else scales / 2
    assert bool(((back - wanted).abs() <= half * (1 + 1e-5)).all())
    assert not bool(back[dense == 0].any())
    assert not bool((bits(weight.to_dense()) == -0x8000).any())
    assert weight.dtype == weight.to_dense().dtype == dense.dtype


@kinds
def test_what_is_representable_comes_back_exactly(kind: ValueKind) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(kind.dtype).float().nan_to_num(0.0).clamp(-kind.largest)
    scales = torch.tensor([0.5, 3.0, 2.0**-10])
    dense = (every * scales[:, None]).half()
    weight = PackedWeight.from_dense(dense, values=kind, scales=scales).validate()
    assert torch.equal(weight.to_dense(), dense)


@kinds
def test_a_nonzero_that_rounds_to_zero_is_stored(kind: ValueKind) -> None:
    dense = torch.zeros(2, 64).half()
    dense[0, 0], dense[0, 1], dense[0, 2] = 1000.0, -1e-4, 1e-4
    weight = PackedWeight.from_dense(dense, values=kind).validate()
    assert weight.nnz == 3
    assert weight.to_dense()[0, 1:].tolist() == [0.0] * 63
    again = weight.shard(1, 0, 2)
    assert again.nnz == 3  # also where it is packed anew


@kinds
def test_scales_are_chosen_by_error(kind: ValueKind) -> None:
    """No row is worse off than with the scale that just fits its largest weight, and most are better off."""
    dense = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    fitting = dense.abs().amax(1) / kind.largest
    chosen = choose_scales(dense, kind)

    def error(scales: Tensor) -> Tensor:
        return (dequantise(quantise(dense, scales, kind), scales, kind, torch.float32) - dense).square().sum(1)

    assert bool((error(chosen) <= error(fitting)).all())
    assert float(error(chosen).sum()) < 0.99 * float(error(fitting).sum())
    assert int((error(chosen) < error(fitting)).sum()) > 48


@kinds
def test_rows_of_zeros_and_of_the_smallest_numbers_have_usable_scales(kind: ValueKind) -> None:
    for dtype in DTYPES:
        dense = torch.zeros(3, 64, dtype=dtype)
        dense[1] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        dense[2] = torch.finfo(dtype).max
        weight = PackedWeight.from_dense(dense, values=kind).validate()
        assert bool(weight.to_dense().isfinite().all())
        assert weight.nnz == 128


@settings(deadline=None, max_examples=40)
@given(matrices(), st.sampled_from(KINDS), st.data())
def test_a_shard_is_the_slice_of_what_was_stored(dense: Tensor, kind: ValueKind, data: st.DataObject) -> None:
    """Nothing is rounded again: shards have the whole's bytes, and column shards the whole rows' scales."""
    dim, world = data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([1, 2, 3]))
    dense = dense.repeat_interleave(world, dim)
    weight = PackedWeight.from_dense(dense, values=kind)
    assert weight.scales is not None
    share = dense.shape[dim] // world
    for rank in range(world):
        part = weight.shard(dim, rank, world).validate()
        rows = slice(rank * share, (rank + 1) * share) if dim == 0 else slice(None)
        cut = dense.narrow(dim, rank * share, share)
        assert same(part, PackedWeight.from_dense(cut, values=kind, scales=weight.scales[rows]))
        assert torch.equal(part.to_dense(), weight.to_dense().narrow(dim, rank * share, share))


@kinds
@pytest.mark.parametrize("sizes", [(64, 64), (24, 16), (1024, 16, 48), (32, 7)])
def test_a_stack_has_the_bytes_of_its_parts(kind: ValueKind, sizes: tuple[int, ...]) -> None:
    dense = [sparse(rows, 200, 0.5 + 0.1 * i, seed=i) for i, rows in enumerate(sizes)]
    parts = [PackedWeight.from_dense(part, values=kind) for part in dense]
    stacked = stack(parts).validate()
    scales = torch.cat([part.scales for part in parts if part.scales is not None])
    expected = PackedWeight.from_dense(torch.cat(dense), values=kind, scales=scales)
    assert stacked.metadata() | {"checksum": 0} == expected.metadata() | {"checksum": 0}
    assert same(replace(stacked, checksum=None), replace(expected, checksum=None))
    with pytest.raises(ValueError, match="value kind"):
        stack([parts[0], PackedWeight.from_dense(dense[0])])


@kinds
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_a_random_weight_is_a_valid_one(kind: ValueKind, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = random_packed(50, 700, sparsity, torch.bfloat16, "cpu", generator, values=kind).validate()
    assert (weight.kind, weight.dtype) == (kind, torch.bfloat16)
    assert weight.sparsity == pytest.approx(sparsity, abs=0.05)
    assert 0 < float(weight.to_dense().abs().max()) <= 1.01e-3


@kinds
@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.70), (0.6, 0.60), (0.7, 0.47)])
def test_it_takes_little_more_than_a_byte_a_nonzero_and_a_bit_an_element(
    kind: ValueKind, sparsity: float, most: float
) -> None:
    weight = random_packed(4096, 4096, sparsity, torch.float16, "cpu", torch.Generator().manual_seed(0), values=kind)
    assert weight.nbytes <= most * 4096 * 4096
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors().values())
    assert weight.dense_nbytes == 2 * 4096 * 4096


def test_another_dtype_changes_no_stored_bit() -> None:
    weight = PackedWeight.from_dense(sparse(32, 100, 0.5), values="int8")
    other = weight.in_dtype(torch.bfloat16).validate()
    assert other.dtype == other.to_dense().dtype == torch.bfloat16
    assert torch.equal(other.values, weight.values)
    assert torch.equal(other.to_dense(torch.float32), weight.to_dense(torch.float32))


def test_16_bit_weights_are_what_they_were() -> None:
    """Readers of version 1 read them; 8-bit ones they refuse by their version."""
    weight = PackedWeight.from_dense(sparse(32, 100, 0.5))
    fields = ["format_version", "shape", "dtype", "tile_words", "max_packets", "packets", "nnz", "checksum"]
    assert list(weight.metadata()) == fields
    assert weight.metadata()["format_version"] == 1
    assert list(weight.tensors()) == ["bitmap", "values", "offsets"]
    assert PackedWeight.from_dense(sparse(32, 100, 0.5), values="fp8").metadata()["format_version"] == 3


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"values": "int4"}, ValueError, "values='int4'.*'16-bit', 'float8_e4m3', 'int8'"),
        ({"scales": torch.ones(4)}, ValueError, "scales are for 8-bit values"),
        ({"values": "int8", "scales": torch.ones(4).double()}, TypeError, "float64.*float32"),
        ({"values": "int8", "scales": torch.ones(3)}, ValueError, r"shape \(3,\).*each of 4 rows"),
        ({"values": "int8", "scales": torch.tensor([1.0, 1, 0, 1])}, ValueError, r"scales\[2\] is 0.0"),
        ({"values": "int8", "scales": torch.tensor([1.0, float("nan"), 1, 1])}, ValueError, r"scales\[1\] is nan"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(arguments: dict[str, object], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        PackedWeight.from_dense(torch.ones(4, 64).half(), **arguments)  # type: ignore[arg-type]


@kinds
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_rounded(kind: ValueKind, number: float) -> None:
    dense = torch.ones(4, 64).half()
    dense[2, 3] = number
    with pytest.raises(ValueError, match="NaN or infinite weights can't be stored as"):
        PackedWeight.from_dense(dense, values=kind)
