"""One layer at a time: which weights go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flash_llm.prune import METHODS, Magnitude, Pruner, Wanda
from flash_llm.prune import method as methods
from flash_llm.prune.method import kth_lowest, zeros_of
from flash_llm.prune.statistics import Collector, InputNorm

SPARSITIES = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.57, 0.6, 0.75, 0.99])


def seen(*batches: Tensor) -> InputNorm:
    statistic = InputNorm()
    for x in batches:
        statistic.add(statistic.measure(x), len(x))
    return statistic


def test_the_methods_are_known_by_name() -> None:
    assert set(METHODS) >= {"magnitude", "wanda"}
    for name, method in METHODS.items():
        assert isinstance(method(), Pruner)
        assert method().name == name


@given(st.integers(1, 400), st.integers(0, 99))
def test_the_number_of_zeros_is_the_floor(elements: int, percent: int) -> None:
    assert zeros_of(elements, percent / 100) == elements * percent // 100


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 70), SPARSITIES, st.integers(0, 2**31))
def test_wanda_drops_the_lowest_scores_of_each_row(rows: int, columns: int, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(13, columns, generator=generator)
    pruned = Wanda().prune(weight, seen(x[:5], x[5:]), sparsity)
    for i in range(rows):
        scores = [abs(weight[i, j].item()) * x[:, j].norm().item() for j in range(columns)]
        dropped = set(sorted(range(columns), key=scores.__getitem__)[: zeros_of(columns, sparsity)])
        assert pruned[i].tolist() == [0.0 if j in dropped else weight[i, j].item() for j in range(columns)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 70), SPARSITIES, st.booleans(), st.integers(0, 2**31))
def test_sparsity_is_exact_among_ties(rows: int, columns: int, sparsity: float, per_row: bool, seed: int) -> None:
    """Weights of few values, as float16 has them, and inputs that are never anything but zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randint(1, 4, (rows, columns), generator=generator) / 4).half()
    x = torch.zeros(3, columns)
    wanda = Wanda().prune(weight, seen(x), sparsity)
    assert ((wanda == 0).sum(dim=1) == zeros_of(columns, sparsity)).all()
    magnitude = Magnitude(per_row).prune(weight, None, sparsity)
    groups = magnitude if per_row else magnitude.reshape(1, -1)
    assert ((groups == 0).sum(dim=1) == zeros_of(groups.shape[1], sparsity)).all()
    assert torch.equal(magnitude, Magnitude(per_row).prune(weight, None, sparsity))
    assert magnitude.dtype == wanda.dtype == torch.float16


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 80), st.integers(0, 2**31))
def test_the_gpus_way_to_the_kth_lowest_is_the_same(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, columns, generator=generator).square() * 10.0 ** torch.randint(
        -40, 30, (1, columns), generator=generator
    )
    score[torch.rand(rows, columns, generator=generator) < 0.2] = -1.0
    score[torch.rand(rows, columns, generator=generator) < 0.2] = torch.inf
    for count in {1, columns // 2 + 1, columns}:
        expected = score.kthvalue(count, dim=1, keepdim=True).values
        for limit in (0, 1 << 26):  # for scores of gigabytes, and for others
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(methods, "_TOPK_ELEMENTS", limit)
                assert torch.equal(kth_lowest(score, count), expected)


def test_zeros_that_are_there_count() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0], [1.0, -4.0, 3.0, 2.0]])
    statistic = seen(torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    # The first input's zero goes before the second one's weight, though both score zero.
    expected = torch.tensor([[0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 2.0]])
    assert torch.equal(Wanda().prune(weight, statistic, 0.5), expected)


def test_the_argument_is_left_alone() -> None:
    weight = torch.randn(4, 8)
    copy = weight.clone()
    for sparsity in (0.0, 0.5):
        Magnitude().prune(weight, None, sparsity)[:] = 7
        assert torch.equal(weight, copy)


def test_statistics_are_of_all_inputs_of_each_layer() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 3), "idle": nn.Linear(6, 3)})
    x, y = torch.randn(2, 5, 6), torch.randn(4, 6)
    with Collector(layers, "norm") as collector:
        layers["a"](x), layers["b"](x), layers["a"](y), layers["b"](x[:, :0])
    norms = {name: statistic for name, statistic in collector.statistics.items() if isinstance(statistic, InputNorm)}
    torch.testing.assert_close(norms["a"].norm, torch.cat([x.flatten(0, 1), y]).norm(dim=0))
    torch.testing.assert_close(norms["b"].norm, x.flatten(0, 1).norm(dim=0))
    assert [statistic.tokens for statistic in norms.values()] == [14, 10, 0]
    with pytest.raises(ValueError, match="No input"):
        _ = norms["idle"].norm
    assert not any(layer._forward_pre_hooks for layer in layers.values())
