"""Packing, slicing and unpacking on the GPU: the same bits as on the CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from flash_llm import FormatError, PackedWeight, ops
from flash_llm.kernels import launch
from flash_llm.tensor import ValueKind
from flash_llm.tensor.layout import TILE_WORDS
from gpu_cases import compile_side_by_side
from sparse_matrices import DTYPES, PATTERNS, any_bits, bits, matrices, sparse, without_negative_zero

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """All unpacking kernels."""
    arch = launch.architecture(0)
    defines = [
        (("ALIGNED", aligned), ("BF16", bf16), ("TILE_WORDS", tile_words), ("VALUES", kind.code))
        for aligned, bf16, tile_words, kind in product((0, 1), (0, 1), TILE_WORDS, ValueKind)
    ]
    compile_side_by_side([("unpack.cu", define, arch) for define in defines])


def assert_same(gpu: PackedWeight, cpu: PackedWeight) -> None:
    assert gpu.device.type == "cuda"
    assert gpu.metadata() == cpu.metadata()
    for ours, theirs in zip(gpu.tensors().values(), cpu.tensors().values(), strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


LARGE = [
    (4096, 4096, 0.7, torch.float16, "even"),
    (5000, 3001, 0.5, torch.bfloat16, "rows"),
    (1001, 11008, 0.8, torch.float16, "columns"),
    (11008, 100, 0.9, torch.bfloat16, "one tile"),
]


@settings(deadline=None, max_examples=100)
@given(matrices())
def test_packing_is_the_same_on_both(dense: Tensor) -> None:
    on_gpu = PackedWeight.from_dense(dense.cuda()).validate()
    assert_same(on_gpu, PackedWeight.from_dense(dense))
    assert torch.equal(bits(on_gpu.to_dense()).cpu(), bits(without_negative_zero(dense)))


@pytest.mark.parametrize(("rows", "columns", "sparsity", "dtype", "pattern"), LARGE)
def test_packing_large_matrices_is_the_same_on_both(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, pattern: str
) -> None:
    dense = sparse(rows, columns, sparsity, dtype, pattern=pattern, device="cuda")
    assert_same(PackedWeight.from_dense(dense), PackedWeight.from_dense(dense.cpu()))


@settings(deadline=None, max_examples=150)
@given(matrices())
def test_the_unpacking_kernel_gives_every_bit(dense: Tensor) -> None:
    weight = PackedWeight.from_dense(dense.cuda())
    assert torch.equal(bits(ops.unpack(weight)).cpu(), bits(without_negative_zero(dense)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_words", TILE_WORDS)
def test_the_unpacking_kernel_knows_every_tile_size(tile_words: int, dtype: torch.dtype) -> None:
    for columns in (64 * tile_words, 64 * tile_words + 1, 3000, 3001):
        sparsity = max(0.0, 1 - 1.5 / tile_words)  # some 48 nonzeros a lane, of at most 96
        dense = any_bits(100, columns, sparsity, dtype, tile_words).cuda()
        weight = PackedWeight.from_dense(dense, tile_words=tile_words)
        assert torch.equal(bits(ops.unpack(weight)), bits(without_negative_zero(dense)))


@pytest.mark.parametrize(("rows", "columns", "sparsity", "dtype", "pattern"), LARGE)
def test_the_unpacking_kernel_on_large_matrices(
    rows: int, columns: int, sparsity: float, dtype: torch.dtype, pattern: str
) -> None:
    dense = sparse(rows, columns, sparsity, dtype, pattern=pattern, device="cuda")
    assert torch.equal(bits(ops.unpack(PackedWeight.from_dense(dense))), bits(without_negative_zero(dense)))


@pytest.mark.parametrize("values", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_words", TILE_WORDS)
def test_8_bit_values_are_packed_as_on_the_cpu_and_unpacked_to_the_same_bits(
    tile_words: int, dtype: torch.dtype, values: str
) -> None:
    """Every number that 8 bits can be, times scales of any size, for whole and for cut-off tiles."""
    for columns in (64 * tile_words, 64 * tile_words + 1, 3001):
        dense = sparse(100, columns, max(0.0, 1 - 1.5 / tile_words), torch.float32, tile_words)
        scales = torch.rand(100) * 2.0 ** -torch.arange(100).remainder(12)
        largest = ValueKind(values).largest
        dense = (dense * scales[:, None] * largest / 3).to(dtype)
        on_cpu = PackedWeight.from_dense(dense, tile_words=tile_words, values=values, scales=scales)
        weight = PackedWeight.from_dense(dense.cuda(), tile_words=tile_words, values=values, scales=scales.cuda())
        assert_same(weight, on_cpu)
        assert torch.equal(bits(ops.unpack(weight)).cpu(), bits(on_cpu.to_dense()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_values_on_gpus_without_an_instruction_for_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = launch.get

    def without(source: str, name: str, defines: tuple[tuple[str, int], ...], arch: str) -> launch.Kernel:
        return get(source, name, (*defines, ("FLOAT8_CONVERTS", 0)), arch)

    monkeypatch.setattr(launch, "get", without)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    dense = numbers.repeat(40, 1).to(dtype).cuda()
    weight = PackedWeight.from_dense(dense, values="float8_e4m3", scales=torch.ones(40, device="cuda"))
    assert torch.equal(ops.unpack(weight), dense)
    assert torch.equal(ops.linear(torch.eye(256, dtype=dtype, device="cuda"), weight), dense.T)


@pytest.mark.parametrize("values", ["float8_e4m3", "int8"])
def test_scales_are_chosen_as_well_as_on_the_cpu(values: str) -> None:
    """Sums of errors may round differently, so that of two scales that are as good either may be taken."""
    dense = sparse(300, 2000, 0.6, device="cuda")
    on_gpu = PackedWeight.from_dense(dense, values=values).validate()
    on_cpu = PackedWeight.from_dense(dense.cpu(), values=values)
    errors = [(weight.to_dense(torch.float32).cpu() - dense.cpu().float()).norm() for weight in (on_gpu, on_cpu)]
    assert float(errors[0]) == pytest.approx(float(errors[1]), rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("dim", "world"), [(0, 2), (0, 5), (1, 2), (1, 5), (0, 8), (1, 8)])
def test_shards_are_the_same_on_both(dim: int, world: int, pattern: str) -> None:
    dense = sparse(640, 1280, 0.7, pattern=pattern)
    gpu, cpu = PackedWeight.from_dense(dense.cuda()), PackedWeight.from_dense(dense)
    for rank in range(world):
        assert_same(gpu.shard(dim, rank, world), cpu.shard(dim, rank, world))


def test_damage_is_found_on_the_gpu() -> None:
    weight = PackedWeight.from_dense(sparse(100, 1000, 0.7, device="cuda")).validate()
    for name, tensor in weight.tensors().items():
        damaged = tensor.clone()
        damaged.view(torch.uint8).view(-1)[tensor.nbytes // 2] ^= 4
        with pytest.raises(FormatError):
            replace(weight, **{name: damaged}).validate()
    with pytest.raises(FormatError, match="different devices"):
        replace(weight, offsets=weight.offsets.cpu()).validate()


def test_packing_takes_at_most_four_times_the_dense_memory() -> None:
    """Of a whole layer of a large model, the dense matrix itself counted in."""
    dense = torch.empty(28672, 7168, dtype=torch.float16, device="cuda")
    for rows in dense.split(2048):
        rows.copy_(torch.randn_like(rows) * (torch.rand_like(rows) > 0.7))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() - dense.nbytes
    torch.cuda.reset_peak_memory_stats()
    PackedWeight.from_dense(dense)
    assert torch.cuda.max_memory_allocated() - before <= 4 * dense.nbytes
