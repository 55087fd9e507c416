"""The operator of vLLM's graphs. Needs no vLLM."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.testing import CompileCounter

from flash_llm.errors import KernelError
from flash_llm.integrations.vllm.operator import linear_at, remember
from flash_llm.integrations.vllm.passes import fold_relu
from flash_llm.tensor import PackedWeight

pytestmark = pytest.mark.filterwarnings("ignore::flash_llm.SlowPathWarning")


def packed(sparsity: float, seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(48, 64, generator=generator).half()
    return PackedWeight.from_dense(dense.masked_fill_(torch.rand(48, 64, generator=generator) < sparsity, 0))


def test_it_multiplies_by_the_weight_whose_bitmap_it_is_given() -> None:
    weights = [remember(packed(0.5, 1)), remember(packed(0.8, 2))]
    x, bias = torch.randn(3, 64).half(), torch.randn(48).half()
    for weight in weights:
        expected = torch.nn.functional.linear(x.float(), weight.to_dense().float(), bias.float())
        torch.testing.assert_close(linear_at(x, bias, weight.bitmap, 48).float(), expected, atol=2e-2, rtol=1e-2)


def test_layers_of_one_shape_have_one_graph() -> None:
    """Whatever their sparsity: see the module."""
    counter = CompileCounter()
    multiply = torch.compile(lambda x, bitmap: linear_at(x, None, bitmap, 48) * 2, backend=counter, fullgraph=True)
    x = torch.randn(3, 64).half()
    for weight in (remember(packed(0.5)), remember(packed(0.9))):
        torch.testing.assert_close(multiply(x, weight.bitmap), linear_at(x, None, weight.bitmap, 48) * 2)
    assert counter.frame_count == 1


def test_a_relu_behind_it_becomes_part_of_it() -> None:
    weight, other = remember(packed(0.5)), remember(packed(0.5, 1))
    seen: list[str] = []

    def count(graph: fx.Graph) -> None:
        fold_relu(graph)
        seen.extend(node.target.__name__ for node in graph.nodes if node.op == "call_function")

    def model(x: Tensor) -> tuple[Tensor, ...]:
        alone = linear_at(x, None, weight.bitmap, 48)
        kept = linear_at(x, None, other.bitmap, 48)
        return alone.relu(), kept.relu(), kept

    x = torch.randn(3, 64).half()
    passes = torch._inductor.config.patch(post_grad_custom_post_pass=count, force_disable_caches=True)
    with passes:
        compiled = torch.compile(model, fullgraph=True)(x)
    assert all(torch.equal(one, other) for one, other in zip(compiled, model(x), strict=True))
    assert bool((compiled[2] < 0).any())
    assert seen.count("relu.default") == 1, "of the product that is asked for itself"


def test_a_weight_that_is_gone_or_moved_is_an_error() -> None:
    weight = remember(packed(0.5))
    bitmap, x = weight.bitmap, torch.randn(3, 64).half()
    with pytest.raises(KernelError, match="were moved"):
        linear_at(x, None, bitmap.clone(), 48)
    del weight
    gc.collect()
    with pytest.raises(KernelError, match="no packed weight of 48 rows"):
        linear_at(x, None, bitmap, 48)
