"""CUDA graphs, streams, torch.compile, gradients and layers on the GPU: the same bits, however it is called."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flash_llm
from flash_llm import PackedWeight, SparseLinear, compress, ops
from flash_llm.kernels import choice, cuda
from gpu_cases import compile_side_by_side, using
from sparse_matrices import sparse

pytestmark = pytest.mark.gpu

SHAPES = [(1536, 576), (2048, 4096), (100, 1000), (4096, 11008)]
NS = (1, 5, 16, 40, 64, 130)


@pytest.fixture(scope="module", autouse=True)
def splits() -> Iterator[None]:
    """8-bit values are multiplied as they are, though these weights are small: that takes two kernels."""
    with using(choice.AUTO, split=True):
        yield


@pytest.fixture(scope="module")
def weights() -> list[PackedWeight]:
    """Of several shapes and tile sizes, so that row blocks are shared in several ways; two of 8-bit values."""
    dense = [sparse(*shape, 0.7, seed=i, device="cuda") for i, shape in enumerate(SHAPES)]
    made = [PackedWeight.from_dense(matrix) for matrix in dense]
    made += [PackedWeight.from_dense(dense[1], values=values) for values in ("fp8", "int8")]
    compile_side_by_side({kernel for weight in made for n in NS for kernel in cuda.configurations(weight, n)})
    return made


def x_for(weight: PackedWeight, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(n, weight.shape[1], generator=generator, device="cuda").to(weight.dtype)


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of a function that has run before, and what it gives at each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def test_a_graph_replays_with_new_x(weights: list[PackedWeight]) -> None:
    """Kernels of several sizes in one graph, which share what counts their row blocks."""
    inputs = [(weight, x_for(weight, n)) for weight in weights for n in NS]
    graph, results = captured(lambda: [flash_llm.linear(x, weight) for weight, x in inputs])
    for seed in (1, 2, 3):
        for weight, x in inputs:
            x.copy_(x_for(weight, len(x), seed))
        graph.replay()
        for (weight, x), y in zip(inputs, results, strict=True):
            assert torch.equal(y, flash_llm.linear(x, weight))


@pytest.mark.parametrize("n", [1, 16, 64, 130])
def test_the_same_bits_at_every_one_of_1000_replays(weights: list[PackedWeight], n: int) -> None:
    inputs = [(weight, x_for(weight, n)) for weight in weights]
    graph, results = captured(lambda: [flash_llm.linear(x, weight) for weight, x in inputs])
    graph.replay()
    first = [y.clone() for y in results]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        for y, expected in zip(results, first, strict=True):
            different += (y != expected).sum()
    assert int(different) == 0


def test_a_weight_that_no_cache_has_seen_gives_the_same_bits() -> None:
    """What blocks of threads wait for differs most at a weight's first product."""
    for seed in range(60):
        weight = PackedWeight.from_dense(sparse(4096, 7168, 0.8, seed=seed, device="cuda"))
        x = x_for(weight, 16, seed)
        results = [flash_llm.linear(x, weight) for _ in range(3)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        expected = x.double() @ weight.to_dense().double().T
        torch.testing.assert_close(results[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_graphs_replay_beside_one_another(weights: list[PackedWeight]) -> None:
    """Two graphs on two streams at the same time, of the same weights, and work outside of graphs beside them."""
    xs = [[x_for(weight, 16, seed) for weight in weights] for seed in (0, 1, 2)]
    expected = [[flash_llm.linear(x, w) for x, w in zip(some, weights, strict=True)] for some in xs]
    first, results_1 = captured(lambda: [flash_llm.linear(x, w) for x, w in zip(xs[0], weights, strict=True)])
    second, results_2 = captured(lambda: [flash_llm.linear(x, w) for x, w in zip(xs[1], weights, strict=True)])
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(streams[0]):
            first.replay()
        with torch.cuda.stream(streams[1]):
            second.replay()
        results_3 = [flash_llm.linear(x, w) for x, w in zip(xs[2], weights, strict=True)]
    torch.cuda.synchronize()
    for results, values in zip((results_1, results_2, results_3), expected, strict=True):
        assert all(torch.equal(y, value) for y, value in zip(results, values, strict=True))


def test_streams_at_the_same_time(weights: list[PackedWeight]) -> None:
    streams = [torch.cuda.Stream() for _ in range(4)]
    xs = [[x_for(weight, 16, seed) for weight in weights] for seed in range(len(streams))]
    expected = [[flash_llm.linear(x, w) for x, w in zip(some, weights, strict=True)] for some in xs]
    torch.cuda.synchronize()
    results = []
    for _ in range(100):
        for stream, some in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream):
                results.append([flash_llm.linear(x, w) for x, w in zip(some, weights, strict=True)])
    torch.cuda.synchronize()
    for number, some in enumerate(results):
        assert all(torch.equal(y, value) for y, value in zip(some, expected[number % len(streams)], strict=True))


def test_a_kernel_that_starts_early_waits_for_its_x() -> None:
    """Kernels overlap the ones before them. A long chain, each of which needs the last, gives what it gives slowly."""
    chain = [PackedWeight.from_dense(sparse(2048, 2048, 0.9, seed=i, device="cuda") / 16) for i in range(10)] * 10
    start = x_for(chain[0], 8)

    def run(pause: Callable[[], None]) -> list[Tensor]:
        x, seen = start, []
        for number, weight in enumerate(chain):
            x = flash_llm.linear(x, weight)
            pause()
            if number % 3 == 0:
                x = x / x.float().std().half()  # another kernel between ours
            seen.append(x)
        return seen

    slow, fast = run(torch.cuda.synchronize), run(lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))


def test_a_kernel_that_starts_early_sees_a_weight_that_was_just_written() -> None:
    dense = sparse(2048, 2048, 0.7, device="cuda")
    weight, other = PackedWeight.from_dense(dense), PackedWeight.from_dense(dense * 2)
    x = x_for(weight, 8)
    once, twice = flash_llm.linear(x, weight), flash_llm.linear(x, other)
    results = []
    for _ in range(50):
        results.append(flash_llm.linear(x, weight))
        weight.values.mul_(2)
        results.append(flash_llm.linear(x, weight))
        weight.values.mul_(0.5)
    torch.cuda.synchronize()
    assert all(torch.equal(y, twice if i % 2 else once) for i, y in enumerate(results))


def test_torch_finds_the_operators_well_defined(weights: list[PackedWeight]) -> None:
    weight = weights[2]
    x, bias = x_for(weight, 5).requires_grad_(), torch.randn(weight.shape[0], device="cuda").half().requires_grad_()
    for some_bias in (None, bias):
        torch.library.opcheck(torch.ops.flash_llm.linear.default, (x, some_bias, *ops._flat(weight)))
    torch.library.opcheck(torch.ops.flash_llm.unpack.default, ops._flat(weight))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_compiles_as_one_graph(weights: list[PackedWeight], mode: str) -> None:
    """With CUDA graphs, which "reduce-overhead" brings, too."""
    pytest.importorskip("triton")
    first, second = SparseLinear.from_packed(weights[0]), nn.Linear(1536, 64, device="cuda", dtype=torch.float16)
    model = nn.Sequential(first, nn.GELU(), second).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for n in (1, 16, 16, 16, 40, 16):
        x = x_for(weights[0], n, n)
        y = compiled(x).clone()
        torch.testing.assert_close(y, model(x), rtol=1e-2, atol=1e-2)


def test_a_thread_may_begin_with_a_kernel(weights: list[PackedWeight]) -> None:
    x = x_for(weights[0], 3, 0)
    y, dense = flash_llm.linear(x, weights[0]), weights[0].to_dense()
    torch.cuda.synchronize()
    for expected, call in ((y, lambda: flash_llm.linear(x, weights[0])), (dense, weights[0].to_dense)):
        with ThreadPoolExecutor(1) as thread:
            assert torch.equal(thread.submit(call).result(), expected)


def test_gradients_are_those_of_a_dense_layer(weights: list[PackedWeight]) -> None:
    weight = weights[0]
    dense = weight.to_dense()
    for shape in ((3,), (2, 3), (300,)):
        found, expected = [], []
        grad = torch.randn(*shape, weight.shape[0], device="cuda").half()
        x0 = torch.randn(*shape, weight.shape[1], device="cuda").half()
        for results, function in (
            (found, lambda x, b: flash_llm.linear(x, weight, b)),
            (expected, lambda x, b: F.linear(x, dense, b)),
        ):
            x, bias = x0.clone().requires_grad_(), torch.ones(weight.shape[0], device="cuda").half().requires_grad_()
            results += torch.autograd.grad(function(x, bias), (x, bias), grad)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-2)


def test_a_layer_moves_to_the_gpu_and_back_and_never_expands_there() -> None:
    dense = nn.Linear(1000, 99, dtype=torch.bfloat16)
    dense.weight.data = sparse(99, 1000, 0.6, torch.bfloat16)
    layer = SparseLinear.from_linear(dense).cuda()
    x = torch.randn(3, 1000).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x.cuda())
    assert layer._dense is None
    torch.testing.assert_close(y.cpu(), dense(x), rtol=2e-2, atol=2e-2)
    assert torch.equal(copy.deepcopy(layer)(x.cuda()), y)
    half = copy.deepcopy(layer).half()
    torch.testing.assert_close(half(x.cuda().half()), copy.deepcopy(dense).cuda().half()(x.cuda().half()))
    with pytest.raises(TypeError, match="convert x"):
        copy.deepcopy(layer).float()(x.cuda().float())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(layer.cpu()(x), dense(x))


def test_compress_packs_each_layer_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).cuda()).half()
    compress(model)
    assert [layer.weight_bitmap.device.type for layer in model] == ["cpu", "cuda"]
