"""The GPU kernels against float32, over shapes, sparsities and patterns; and their fitness for graphs and streams."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import flash_llm
from flash_llm import PackedWeight, ops
from sparse_matrices import PATTERNS, any_bits, sparse

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIZES = (1, 16, 63, 64, 100, 192, 576, 1000, 1536, 4096, 11008)


@pytest.fixture(autouse=True)
def dense_products_in_float32() -> Iterator[None]:
    """From 257 rows of x on cuBLAS multiplies, and by torch's default it may add up in 16 bits where it splits K."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction
    settings.allow_fp16_reduced_precision_reduction = settings.allow_bf16_reduced_precision_reduction = False
    yield
    settings.allow_fp16_reduced_precision_reduction, settings.allow_bf16_reduced_precision_reduction = before


def on_gpu(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int, pattern: str = "even") -> Tensor:
    return sparse(rows, columns, sparsity, dtype, seed, pattern).cuda()


def assert_right(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Every element within its own rounding, and float32's over the sum that it is."""
    x, w = x.float(), dense.float()
    expected = x.double() @ w.double().t()
    size = x.abs().double() @ w.abs().double().t()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.abs().double()
    allowed = ROUNDING[y.dtype] * expected.abs() * 1.01 + 2.0**-20 * size + 2.0**-24
    worst = ((y.double() - expected).abs() - allowed).max()
    assert worst <= 0, f"off by {float(worst)} more than allowed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "sparsity"), [(1, 1, 0.0), (63, 576, 0.5), (1000, 11008, 0.9), (80, 640, 1)]
)
def test_packing_gives_the_same_bits_as_on_a_cpu(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> None:
    dense = sparse(rows, columns, sparsity, dtype)
    here, there = PackedWeight.from_dense(dense.cuda()), PackedWeight.from_dense(dense)
    assert here.metadata() == there.metadata()
    for name, tensor in there.tensors().items():
        assert torch.equal(here.tensors()[name].cpu(), tensor)
    here.validate()


@pytest.mark.parametrize("seed", range(12))
def test_unpacking_gives_the_dense_matrix_back(seed: int) -> None:
    rng = random.Random(seed)
    rows, columns, sparsity = rng.choice(SIZES), rng.choice(SIZES), rng.choice((0.0, 0.3, 0.6, 0.9, 1.0))
    for dtype in ROUNDING:
        dense = any_bits(rows, columns, sparsity, dtype, seed)
        packed = PackedWeight.from_dense(dense)
        unpacked = ops.unpack(packed.to("cuda")).cpu()
        assert torch.equal(unpacked.view(torch.int16), packed.to_dense().view(torch.int16))


@pytest.mark.parametrize("seed", range(100))
def test_every_element_is_right(seed: int) -> None:
    """Three cases a seed: 300 in all."""
    for case in range(3):
        rng = random.Random(3 * seed + case)
        rows, columns = rng.choice(SIZES), rng.choice(SIZES)
        n = rng.choice((1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 130, 300))
        sparsity = rng.choice((0.0, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98, 1.0))
        dtype, pattern = rng.choice(list(ROUNDING)), rng.choice(PATTERNS)
        dense = on_gpu(rows, columns, sparsity, dtype, seed, pattern)
        x = torch.randn(n, columns, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)
        bias = torch.randn(rows, device="cuda").to(dtype) if rng.random() < 0.5 else None
        y = flash_llm.linear(x, PackedWeight.from_dense(dense), bias)
        assert y.dtype == dtype
        assert_right(y, x, dense, bias)


@pytest.mark.parametrize("tile_words", [1, 2, 3, 5, 7, 8, 10, 12, 16])
@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_every_tile_size(tile_words: int, n: int) -> None:
    dense = on_gpu(600, 3000, 0.93, torch.float16, tile_words)
    x = torch.randn(n, 3000, device="cuda").half()
    assert_right(flash_llm.linear(x, PackedWeight.from_dense(dense, tile_words=tile_words)), x, dense)


def test_x_may_lie_anyhow() -> None:
    dense = on_gpu(320, 456, 0.6, torch.float16, 0)
    packed = PackedWeight.from_dense(dense)
    wide = torch.randn(20, 1000, device="cuda").half()
    for x in (wide[:, :456], wide[:, 1:457], wide[::2, 8:464], wide.t()[:456].t(), wide[:1, :456], wide[3, :456]):
        assert_right(flash_llm.linear(x, packed), x, dense)
    deep = torch.randn(2, 3, 456, device="cuda").half()
    assert flash_llm.linear(deep, packed).shape == (2, 3, 320)
    assert flash_llm.linear(deep[:0], packed).shape == (0, 3, 320)


@pytest.mark.parametrize(
    ("rows", "columns", "n"), [(7168, 7168, 16), (4096, 4096, 8), (1536, 576, 1), (2048, 8192, 64)]
)
def test_a_thousand_replays_give_the_same_bits(rows: int, columns: int, n: int) -> None:
    packed = PackedWeight.from_dense(on_gpu(rows, columns, 0.7, torch.float16, 0))
    x = torch.randn(n, columns, device="cuda").half()
    expected = flash_llm.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [flash_llm.linear(x, packed) for _ in range(10)]
    for _ in range(100):
        graph.replay()
        assert all(torch.equal(result, expected) for result in results)


def test_fresh_weights_each_time_give_the_same_bits_twice() -> None:
    """Timing differs most when everything is new to the caches."""
    for seed in range(60):
        generator = torch.Generator("cuda").manual_seed(seed)
        dense = torch.randn(4096, 7168, device="cuda", generator=generator).half()
        dense[torch.rand(4096, 7168, device="cuda", generator=generator) < 0.8] = 0
        packed = PackedWeight.from_dense(dense)
        x = torch.randn(16, 7168, device="cuda", generator=generator).half()
        results = [flash_llm.linear(x, packed) for _ in range(3)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert_right(results[0], x, dense)


def test_a_captured_graph_reads_new_x() -> None:
    dense = on_gpu(1000, 1000, 0.7, torch.bfloat16, 0)
    packed = PackedWeight.from_dense(dense)
    x = torch.zeros(5, 1000, device="cuda").bfloat16()
    flash_llm.linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = flash_llm.linear(x, packed)
    for _ in range(3):
        x.copy_(torch.randn(5, 1000))
        graph.replay()
        assert_right(y, x, dense)


def test_two_streams_at_once() -> None:
    dense = on_gpu(5000, 4096, 0.7, torch.float16, 0)
    packed = PackedWeight.from_dense(dense)
    xs = [torch.randn(9, 4096, device="cuda").half() for _ in range(2)]
    expected = [flash_llm.linear(x, packed) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(flash_llm.linear(xs[i], packed))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i]) for i in range(2) for y in results[i])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_process() -> None:
    dense = sparse(1000, 2000, 0.7)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        x = torch.randn(5, 2000).half().to(device)
        y = flash_llm.linear(x, PackedWeight.from_dense(dense.to(device)))
        assert y.device == torch.device(device)
        assert_right(y.cuda(0), x.cuda(0), dense.cuda(0))


def test_compiled_and_differentiated() -> None:
    dense = on_gpu(300, 500, 0.6, torch.float16, 0)
    packed = PackedWeight.from_dense(dense)
    x = torch.randn(6, 500, device="cuda").half().requires_grad_()
    y = torch.compile(flash_llm.linear, fullgraph=True)(x, packed)
    assert_right(y.detach(), x.detach(), dense)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ dense)


def test_x_on_another_device_is_refused() -> None:
    packed = PackedWeight.from_dense(on_gpu(16, 64, 0.5, torch.float16, 0))
    with pytest.raises(ValueError, match="cpu"):
        flash_llm.linear(torch.zeros(1, 64).half(), packed)


def test_packing_a_large_matrix_takes_little_memory() -> None:
    """At most four times the dense matrix at the peak, itself included."""
    dense = torch.randn(28672, 7168, device="cuda", dtype=torch.float16)
    dense.masked_fill_(torch.rand(28672, 7168, device="cuda", dtype=torch.float16) < 0.7, 0)
    torch.cuda.reset_peak_memory_stats()
    PackedWeight.from_dense(dense)
    assert torch.cuda.max_memory_allocated() <= 4 * dense.nbytes
