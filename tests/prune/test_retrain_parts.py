"""The parts of retraining, each against a few lines that say the same in another way."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from flash_llm.prune.retrain import loss as losses
from flash_llm.prune.retrain.admm import Admm
from flash_llm.prune.retrain.data import Batches
from flash_llm.prune.retrain.lora import add_adapters, merge_adapters
from flash_llm.prune.retrain.loss import language_loss
from flash_llm.prune.retrain.masks import Masks
from flash_llm.prune.retrain.schedule import Gradual, Targets
from flash_llm.prune.retrain.select import lowest_of_all


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.5)])
@pytest.mark.parametrize("chunk", [1 << 24, 40])
def test_the_loss_and_its_gradient(
    distill: float, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formula, differentiated by autograd."""
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    student, teacher = random(2, 5, 11).requires_grad_(), random(2, 5, 11, seed=1)
    loss, entropy = language_loss(student, ids, teacher, distill, temperature)
    (2 * loss).backward()
    found, student.grad = student.grad, None

    p = torch.softmax(teacher[:, :-1] / temperature, -1)
    q = torch.softmax(student[:, :-1] / temperature, -1)
    ce = -torch.log_softmax(student[:, :-1], -1).gather(2, ids[:, 1:, None]).mean()
    kl = (p * (p / q).log()).sum(-1).mean()
    expected = (1 - distill) * ce + distill * temperature**2 * kl
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(entropy, ce)
    torch.testing.assert_close(found, student.grad)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    logits = random(1, 4, 7).requires_grad_()
    loss, _ = language_loss(logits, torch.zeros(1, 4, dtype=torch.int64), logits.detach(), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-7


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=4), st.data())
def test_the_lowest_of_all(values: list[list[int]], data: Any) -> None:
    flat = [value for row in values for value in row]
    count = data.draw(st.integers(0, len(flat)))
    marks = lowest_of_all([torch.tensor(row, dtype=torch.float32) / 7 for row in values], count)
    expected = sorted(sorted(range(len(flat)), key=lambda i: flat[i])[:count])  # sorted is stable: the first ones win
    assert torch.cat(marks).nonzero().flatten().tolist() == expected


def layer(*rows: list[float]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(rows))


def test_taylor_scores_are_those_of_autograd() -> None:
    """The sum of |w * dL/dw| over two batches decides, and what was dropped before stays so."""
    weight = layer([2.0, 0.0, -1.0, 3.0], [0.5, 1.5, -2.5, 1.0])
    inputs = [random(3, 4, seed=seed) for seed in (1, 2)]
    masks = Masks({"a": weight})
    schedule = Gradual(masks, Targets(masks, 0.5, "layer"), "taylor", begin=0, end=2, rounds=1)
    for step, x in enumerate(inputs, 1):
        weight.grad = None
        (x @ weight.T).square().sum().backward()
        schedule.after_backward(step)
        schedule.after_update(step)

    start = torch.tensor([[2.0, 0.0, -1.0, 3.0], [0.5, 1.5, -2.5, 1.0]])
    # By hand: d/dW of sum (x W^T)^2 is 2 (x W^T)^T x.
    score = sum((start * (2 * (x @ start.T).T @ x)).abs() for x in inputs)
    worst = score.masked_fill(start == 0, math.inf).flatten().topk(3, largest=False).indices
    expected = start.flatten().index_fill(0, worst, 0.0).view(2, 4)
    assert torch.equal(weight.data, expected)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_gradual_schedule_follows_the_cubic(scope: str) -> None:
    weights = {"a": nn.Parameter(random(20, 10)), "b": nn.Parameter(10 * random(30, 10, seed=1))}
    weights["a"].data[:4] = 0  # 40 of 200
    masks = Masks(weights)
    schedule = Gradual(masks, Targets(masks, 0.8, scope), "magnitude", begin=10, end=50, rounds=4)
    before = {name: mask.clone() for name, mask in masks.dropped.items()}
    seen = []
    for step in range(1, 61):
        weights["a"].data += ~masks.dropped["a"] * 0.01
        schedule.after_update(step)
        now = {name: masks.zeros(name) for name in weights}
        assert now == {name: int((weight == 0).sum()) for name, weight in weights.items()}
        assert all(bool((masks.dropped[name] | ~before[name]).all()) for name in weights)
        before = {name: mask.clone() for name, mask in masks.dropped.items()}
        seen.append(now)
    cubic = [1 - (1 - min(4, max(0, (step - 10) // 10)) / 4) ** 3 for step in range(1, 61)]
    if scope == "layer":
        assert [now["a"] for now in seen] == [40 + round(share * 120) for share in cubic]
        assert [now["b"] for now in seen] == [round(share * 240) for share in cubic]
    else:
        assert [now["a"] + now["b"] for now in seen] == [40 + round(share * 360) for share in cubic]
        assert seen[-1]["a"] / 200 > 0.9 > seen[-1]["b"] / 300  # the weights of b are ten times as large


def test_admm_finds_the_sparse_optimum_where_the_largest_weights_are_not_it() -> None:
    """min (x - t)^T H (x - t) with one nonzero: the projection of the optimum keeps the wrong weight, ADMM doesn't."""
    target, hessian = torch.tensor([[1.0, 1.2]]), torch.tensor([[25.0, 0.0], [0.0, 1.0]])
    weight = nn.Parameter(target.clone())
    masks = Masks({"x": weight})
    optimizer = torch.optim.Adam([weight], lr=0.05)
    weight.grad = torch.zeros_like(weight)
    schedule = Admm(masks, Targets(masks, 0.5, "layer"), optimizer, "magnitude", 5.0, 20, begin=1, end=1000)
    for step in range(1, 1101):
        gap = weight.detach() - target
        weight.grad = 2 * gap @ hessian
        schedule.before_update(step)
        optimizer.step()
        masks.hold_weights()
        schedule.after_update(step)
    assert weight[0, 1] == 0
    assert weight[0, 0].item() == pytest.approx(1.0, abs=0.02)


def test_the_second_moments_weigh_the_projection() -> None:
    weight = layer([1.0, 2.0])
    masks = Masks({"x": weight})
    optimizer: Any = SimpleNamespace(state={weight: {"exp_avg_sq": torch.tensor([[9.0, 1.0]])}})
    for score, kept in (("magnitude", [0.0, 2.0]), ("taylor", [1.0, 0.0])):
        schedule = Admm(masks, Targets(masks, 0.5, "layer"), optimizer, score, 1.0, 4, begin=1, end=9)
        schedule.after_update(1)
        assert schedule.state()["z.x"].tolist() == [kept]
        assert schedule.state()["u.x"].tolist() == [[0.0, 0.0]]
        schedule.after_update(5)  # an interval later x is still where it was
        assert schedule.state()["u.x"].tolist() == [[1.0 - kept[0], 2.0 - kept[1]]]


def test_adapters_merge_into_what_was_trained() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    model[0].weight.data[random(6, 8) < 0] = 0
    masks = Masks({"0.weight": model[0].weight})
    zero = masks.dropped["0.weight"].clone()
    before, x = model(random(5, 8)), random(5, 8)
    add_adapters(model, masks, 2, True, seed=0)
    assert torch.equal(model(random(5, 8)), before)  # B is zero
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert names == {
        "0.bias",
        "0.parametrizations.weight.0.a",
        "0.parametrizations.weight.0.b",
        "1.bias",
        "1.weight",
    }
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        functional.mse_loss(model(x), torch.ones(5, 6)).backward()
        optimizer.step()
    trained = model(x)
    merge_adapters(model, masks)
    assert torch.equal(model(x), trained)
    assert torch.equal(model[0].weight == 0, zero)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_an_epoch_sees_every_window_once_and_never_the_last_ones() -> None:
    ids = torch.arange(100)
    batches = Batches(ids, seqlen=8, batch=3, validation=2, seed=0)
    assert batches.validation.tolist() == [list(range(84, 92)), list(range(92, 100))]
    assert (batches.windows, batches.steps(2), batches.steps(0.01)) == (9, 6, 1)
    epochs = [torch.cat([batches(step) for step in range(first, first + 3)]) for first in (0, 3)]
    for windows in epochs:
        assert windows.unique().numel() == windows.numel() == 72
        assert windows.max() < 84
        assert all(row.tolist() == list(range(row[0], row[0] + 8)) for row in windows)
    assert not torch.equal(epochs[0].sort(0).values, epochs[1].sort(0).values)  # cut from another offset


def test_the_order_depends_on_seed_and_step_alone() -> None:
    one, two, other = (Batches(torch.arange(1000), 8, 3, 2, seed) for seed in (0, 0, 1))
    expected = [one(step) for step in range(90)]
    assert all(torch.equal(two(step), expected[step]) for step in (89, 0, 45, 44))
    assert not torch.equal(other(0), expected[0])
