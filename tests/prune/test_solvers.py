"""SparseGPT and ALPS: layers small enough to know the best answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flash_llm.prune import ALPS, CalibrationConfig, Magnitude, Pruner, SparseGPT, Wanda, prune_folder
from flash_llm.prune.alps import refit
from flash_llm.prune.hessian import damped, inverse_root, relative_error
from flash_llm.prune.method import zeros_of
from flash_llm.prune.statistics import Collector, Hessian, InputNorm

from .conftest import tensors

Make = Callable[..., Path]
SOLVERS: list[Pruner] = [SparseGPT(), ALPS()]


def hessian_of(x: Tensor) -> Hessian:
    statistic = Hessian()
    statistic.add(statistic.measure(x), len(x))
    return statistic


def problem(rows: int, columns: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that depend on each other and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, (columns + 1) // 2, generator=generator)
    common = hidden @ torch.randn(hidden.shape[1], columns, generator=generator) / hidden.shape[1] ** 0.5
    x = (common + 0.5 * torch.randn(common.shape, generator=generator)) * (
        0.3 + torch.rand(columns, generator=generator)
    )
    return torch.randn(rows, columns, generator=generator), x


def best_values(weight: Tensor, support: Tensor, hessian: Tensor) -> Tensor:
    """The closed form for a fixed support: the normal equations of each row, in float64."""
    h, result = hessian.double(), torch.zeros(weight.shape, dtype=torch.float64)
    for row, (w, s) in enumerate(zip(weight.double(), support, strict=True)):
        result[row, s] = torch.linalg.solve(h[s][:, s], h[s] @ w)
    return result.float()


def test_the_root_is_of_the_inverse() -> None:
    _, x = problem(1, 30, 0)
    hessian = x.T @ x
    root = inverse_root(hessian, 0.01)
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.T @ root @ damped(hessian, 0.01), torch.eye(30), atol=1e-3, rtol=0)


def test_conjugate_gradients_end_at_the_normal_equations() -> None:
    weight, x = problem(6, 24, 1)
    hessian = x.T @ x
    scale = hessian.diagonal().sqrt()
    scaled = hessian / scale / scale[:, None]
    sparse = weight.masked_fill(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6, 0.0)
    got = refit(sparse, weight @ scaled, scaled, iterations=200)
    assert torch.equal(got != 0, sparse != 0)
    torch.testing.assert_close(got, best_values(weight, sparse != 0, scaled), atol=1e-3, rtol=1e-3)


def test_sparsegpt_is_optimal_brain_surgery_with_an_order() -> None:
    """One block, so one choice: each drop is made up for by the columns behind it alone, as if solved exactly."""
    weight, x = problem(5, 20, 2)
    hessian = damped(x.T @ x, 1e-6)
    got = SparseGPT(damping=1e-6).prune(weight, hessian_of(x), 0.5)
    dropped = got == 0
    expected = weight.double()
    for j in range(20):
        # With columns 0 to j settled, the others take the values that are best for what the row has become.
        free, h = slice(j + 1, None), hessian.double()
        error = expected[:, j] * dropped[:, j]
        expected[:, j] -= error
        if j < 19:
            expected[:, free] += error[:, None] * torch.linalg.solve(h[free, free], h[free, j])
    torch.testing.assert_close(got, expected.float(), atol=2e-3, rtol=2e-3)


def test_blocks_only_decide_which_weights_go() -> None:
    """What a drop in one block does to another is the same as if both were one."""
    weight, x = problem(3, 24, 3)
    small = SparseGPT(block=7).prune(weight, hessian_of(x), 0.5)
    errors = [
        relative_error(weight, pruned, x.T @ x)
        for pruned in (small, best_values(weight, small != 0, x.T @ x), weight * (small != 0))
    ]
    assert errors[1] < errors[0] < errors[2]


@pytest.mark.parametrize("seed", range(4))
def test_alps_finds_nearly_the_best_support(seed: int) -> None:
    weight, x = problem(1, 12, seed)
    hessian = x.T @ x
    supports = torch.zeros(924, 12, dtype=torch.bool)
    for row, kept in enumerate(combinations(range(12), 6)):
        supports[row, list(kept)] = True
    best = min(relative_error(weight, best_values(weight, s[None], hessian), hessian) for s in supports)
    random = relative_error(weight, best_values(weight, supports[:1], hessian), hessian)
    got = relative_error(weight, ALPS(damping=1e-5, refit=50).prune(weight, hessian_of(x), 0.5), hessian)
    assert best * 0.999 <= got <= 1.35 * best < random


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_better_solvers_make_smaller_errors(sparsity: float) -> None:
    for seed in range(3):
        weight, x = problem(32, 48, seed)
        norm = InputNorm()
        norm.add(norm.measure(x), len(x))
        statistics = {"none": None, "norm": norm, "hessian": hessian_of(x)}
        alps, sparsegpt, wanda, magnitude = (
            relative_error(weight, method.prune(weight, statistics[method.needs], sparsity), x.T @ x)
            for method in (ALPS(), SparseGPT(), Wanda(), Magnitude())
        )
        assert alps < sparsegpt < wanda < magnitude


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(SOLVERS),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 0.5, 0.57, 0.8, 0.99]),
    st.integers(0, 12),
    st.integers(0, 2**31),
)
def test_sparsity_is_exact(solver: Pruner, rows: int, columns: int, sparsity: float, dead: int, seed: int) -> None:
    """Whatever the shape, and with inputs that are always zero among the others."""
    weight, x = problem(rows, columns, seed, tokens=50)
    x[:, :dead] = 0
    copy = weight.clone()
    pruned = solver.prune(weight, hessian_of(x), sparsity)
    assert int((pruned == 0).sum()) == zeros_of(weight.numel(), sparsity)
    assert torch.equal(weight, copy)
    assert pruned.shape == weight.shape


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_weights_of_dead_inputs_go_first(solver: Pruner) -> None:
    weight, x = problem(8, 20, 5)
    x[:, 3] = x[:, 7] = 0
    pruned = solver.prune(weight, hessian_of(x), 0.5)
    assert not pruned[:, [3, 7]].any()
    others = [j for j in range(20) if j not in (3, 7)]
    alone = solver.prune(weight[:, others], hessian_of(x[:, others]), 64 / 144)
    assert torch.equal(pruned[:, others], alone)
    few = solver.prune(weight, hessian_of(x), 0.05)
    assert set((few == 0).nonzero()[:, 1].tolist()) <= {3, 7}
    assert torch.equal(few[few != 0], weight[few != 0])


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_a_singular_hessian_is_damped_and_little_text_is_said(solver: Pruner) -> None:
    weight, x = problem(8, 40, 6, tokens=5)
    with pytest.warns(UserWarning, match="5 calibration tokens don't determine 40 inputs"):
        pruned = solver.prune(weight, hessian_of(x), 0.5)
    assert int((pruned == 0).sum()) == 160
    assert relative_error(weight, pruned, x.T @ x) < relative_error(
        weight, Magnitude().prune(weight, None, 0.5), x.T @ x
    )


def test_more_damping_is_said_and_no_hessian_is_refused() -> None:
    indefinite = torch.eye(4) + torch.tensor([[0.0, 1.05, 0, 0], [1.05, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    with pytest.warns(UserWarning, match=r"singular and was damped by 0\.1, not 0\.01"):
        inverse_root(indefinite, 0.01)
    with pytest.raises(ValueError, match="4 inputs is not positive definite even with 1 of its mean"):
        inverse_root(torch.ones(4, 4) - 3 * torch.eye(4), 0.01)


def test_values_too_large_for_the_weight_are_refused() -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[1.0, 100.0], [0.0, 1.0]])
    weight = torch.tensor([[6e4, 6e4]]).half()
    x[:, 0] = 3 * x[:, 1]  # the second has to do three times as much
    with pytest.raises(ValueError, match=r"too large for torch\.float16: convert the model to bfloat16"):
        SparseGPT().prune(weight.flip(1), hessian_of(x.flip(1) * torch.tensor([1.0, 0.3])), 0.5)


@pytest.mark.parametrize("make", [lambda: SparseGPT(damping=0.0), lambda: ALPS(damping=-1.0)])
def test_no_damping_is_refused(make: Callable[[], Pruner]) -> None:
    with pytest.raises(ValueError, match=r"damping=.* must be positive"):
        make()


def test_layers_with_the_same_inputs_share_a_hessian() -> None:
    layers = nn.ModuleDict({name: nn.Linear(6, 2) for name in "abc"})
    x, y, z = (torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    with Collector(layers, "hessian") as collector:
        layers["a"](x), layers["b"](x), layers["c"](y), layers["a"](y), layers["b"](y)
    a, b, c = (collector.statistics[name] for name in "abc")
    assert a is b
    assert a is not c
    with collector:
        layers["a"](z), layers["b"](x)
    assert [s.tokens for s in collector.statistics.values()] == [12, 12, 4]
    for name, seen in {"a": [x, y, z], "b": [x, y, x], "c": [y]}.items():
        inputs = torch.cat(seen)
        torch.testing.assert_close(collector.statistics[name].matrix, inputs.T @ inputs)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_a_folder_is_pruned_and_what_was_odd_is_recorded(
    method: str, make_model: Make, text: Path, tmp_path: Path
) -> None:
    source = make_model("llama", dtype=torch.float16)
    calibration = CalibrationConfig(str(text), samples=2, seqlen=20)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = prune_folder(source, tmp_path / "out", method, 0.6, calibration=calibration, progress=False)
    weights = tensors(tmp_path / "out")
    for layer in report.layers.values():
        assert weights[layer.tensor].dtype == torch.float16
        assert layer.zeros == zeros_of(weights[layer.tensor].numel(), 0.6)
    # The MLP's second layer has 50 inputs, and the text 40 tokens.
    assert len(report.warnings) == 3
    assert report.warnings[0] == (
        "model.layers.0.mlp.down_proj: 40 calibration tokens don't determine 50 inputs: more text gives better quality."
    )


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_the_gpu_solves_as_well_as_the_cpu(solver: Pruner) -> None:
    weight, x = problem(128, 192, 8, tokens=2000)
    cpu = solver.prune(weight, hessian_of(x), 0.7)
    gpu = solver.prune(weight.cuda(), hessian_of(x.cuda()), 0.7).cpu()
    assert int((gpu == 0).sum()) == int((cpu == 0).sum())
    errors = [relative_error(weight, pruned, x.T @ x) for pruned in (cpu, gpu)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
