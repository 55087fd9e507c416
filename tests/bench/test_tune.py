"""Tuning, on a CPU with a clock that knows how long each plan takes; and once on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from devices import DEVICES
from flash_llm.bench import timing, tune
from flash_llm.bench.tune import Tuner, model_targets, random_targets
from flash_llm.checkpoint import compress_folder, load_packed
from flash_llm.cli import app
from flash_llm.errors import KernelError
from flash_llm.kernels import choice, cuda, plan, reference, tuned
from flash_llm.tensor import PackedWeight
from tiny_models import pruned_model

H100 = DEVICES["H100"]
SLOW = 50.0


class Clock:
    """A meter and a GPU in one: products are the reference's, and a launch takes what ``us`` says of its plan."""

    device = torch.device("cpu")

    def __init__(self, us: dict[tuned.Choice, float], wrong: tuned.Choice | None = None) -> None:
        self.us, self.wrong = us, wrong
        self.last: tuned.Choice = (0, 0)
        self.compiled: list[plan.SpmmPlan] = []
        self.weights: set[int] = set()

    def multiply(self, x: Tensor, weight: PackedWeight, chosen: plan.SpmmPlan) -> Tensor:
        self.last = tuned.choice_of(chosen)
        self.weights.add(weight.values.data_ptr())
        kernels = {(plan.source, plan.defines) for plan in self.compiled}
        assert (chosen.source, chosen.defines) in kernels, "compiled ahead"
        return reference.linear(x, weight, None) * (2 if self.last == self.wrong else 1)

    def read_bandwidth(self) -> float:
        raise AssertionError("nobody needs it")

    def graph(self, run: Callable[[int], object], launches: int) -> float:
        for i in range(launches):
            run(i)
        return self.us.get(self.last, SLOW)

    def queued(self, run: Callable[[int], object], launches: int) -> float:
        raise AssertionError("launches that may be captured are measured as graphs")


def tuner(clock: Clock, kernel: str = "auto") -> Tuner:
    return Tuner(clock, H100, kernel, clock.multiply, clock.compiled.extend)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_COPIES", 3)


def rows_of(clock: Clock, *ns: int, shapes: tuple[tuple[int, int], ...] = ((128, 192),)) -> list[dict[str, Any]]:
    found = tuner(clock).tune(random_targets(shapes, [0.6]), list(ns))
    return [row for _, rows in found for row in rows]


def test_the_quickest_plan_wins_and_the_row_is_one_that_plans_can_be_made_from() -> None:
    clock = Clock({(4, 1): 8.0, (8, 1): 5.0})
    (row,) = rows_of(clock, 8)
    assert (row["warps"], row["resident"], row["us"], row["usual_us"]) == (8, 1, 5.0, SLOW)
    assert (row["kernel"], row["rows"], row["columns"], row["n_blocks"], row["n"]) == ("auto", 128, 192, 1, 8)
    assert row["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert len(clock.weights) == 3, "copies are gone through in turn"
    weight = random_targets([(128, 192)], [0.6])[0].make(clock.device)
    numbers = (128, 192, weight.values.numel() // 8, weight.max_packets, weight.tile_words)
    table = {tuple(row[name] for name in tuned.PLACE): (8, 1)}
    assert tuned.choice_of(tuned.spmm_plan(table, H100, numbers, 5, False)) == (8, 1)


def test_the_usual_plan_stays_unless_another_is_clearly_quicker() -> None:
    usual = tuple(rows_of(Clock({}), 8)[0]["usual"])
    other = next(choice for choice in tuned.CHOICES if choice != usual)
    for us, best in ((9.9, usual), (9.7, other)):
        (row,) = rows_of(Clock({usual: 10.0, other: us}), 8)
        assert (row["warps"], row["resident"]) == best
        assert row["usual"] == list(usual)


def test_of_ns_that_a_plan_treats_alike_the_largest_is_measured() -> None:
    rows = rows_of(Clock({}), 1, 8, 16, 49, 64)
    assert [(row["n"], row["n_blocks"], row["passes"]) for row in rows] == [(8, 1, 1), (16, 2, 1), (64, 8, 1)]


def test_rows_of_many_passes_are_told_apart() -> None:
    """As many rows of x as one launch takes, of the kernel that takes 64 at a time."""
    clock = Clock({})
    portable = Tuner(clock, DEVICES["A100"], "auto", clock.multiply, clock.compiled.extend)
    ((_, rows),) = portable.tune(random_targets([(16, 40_000)], [0.6]), [64, 128, 200])
    assert [(row["n"], row["n_blocks"], row["passes"]) for row in rows] == [
        (64, 8, 1),
        (128, 8, 2),
        (200, 8, 4),
    ]


def test_weights_of_the_same_shape_and_tile_size_are_measured_once() -> None:
    found = [*tuner(Clock({})).tune(random_targets([(128, 192)], [0.6, 0.601]), [8])]
    assert [len(rows) for _, rows in found] == [1, 0]


def test_a_wrong_plan_ends_the_run() -> None:
    usual = tuple(rows_of(Clock({}), 8)[0]["usual"])
    other = next(choice for choice in tuned.CHOICES if choice != usual)
    with pytest.raises(KernelError, match=r"two plans .* differ \(128x192 at 60%, n=8, warps and blocks"):
        rows_of(Clock({}, wrong=other), 8)


def test_too_many_rows_of_x_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n 5000: from 2048 .* product is torch's"):
        rows_of(Clock({}), 8, 5000)


def test_no_target_is_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 11.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(seconds))
    targets = random_targets([(128, 192), (64, 64), (32, 32)], [0.6])
    assert [target for target, _ in tuner(Clock({})).tune(targets, [8], time_limit=10)] == targets[:1]


def test_a_models_layers_are_tuned_alone_and_merged(tmp_path: Path) -> None:
    """A compressed folder's own weights; of a name the shapes, with random weights."""
    pruned_model("llama").save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "small", progress=False)
    made = {target.name: target.make(torch.device("cpu")) for target in model_targets(tmp_path / "small", [])}
    block = "model.layers.0"
    query = load_packed(tmp_path / "small", f"{block}.self_attn.q_proj")
    assert torch.equal(made[f"{block}.self_attn.q_proj"].to_dense(), query.to_dense())
    merged = " + ".join(f"{block}.self_attn.{name}_proj" for name in "qkv")
    assert made[merged].shape == (72 + 24 + 24, 72)
    assert made[f"{block}.mlp.gate_proj + {block}.mlp.up_proj"].shape == (220, 72)
    assert not any("lm_head" in name for name in made)
    random = {target.make(torch.device("cpu")).shape for target in model_targets(tmp_path / "dense", [0.7])}
    assert random == {weight.shape for weight in made.values()}


def test_the_command_keeps_what_it_found_after_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    clock = Clock({(8, 1): 5.0})
    monkeypatch.setattr(timing, "CudaMeter", lambda: clock)
    monkeypatch.setattr(tune, "cuda_tuner", lambda meter, kernel: tuner(meter, kernel))
    seconds = iter([0.0, 1.0, 2.0, 11.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(seconds, 12.0))
    words = ["--shapes", "128x192,64x64,32x32", "--sparsity", "0.6", "--n", "8", "--time-limit", "10"]
    result = CliRunner().invoke(app, ["tune", *words])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    assert [(row["rows"], row["warps"]) for row in tuned.read(file)] == [(128, 8), (64, 8)]
    assert "8 x 1" in result.stdout
    assert "900%" in result.stdout
    assert "Not tuned: 32x32 at 60%, the time limit of 10 s." in result.stdout
    assert f"wrote {file}" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["opt-125m", "--shapes", "8x8"], "opt-125m and --shapes 8x8: give one of them"),
        (["--time-limit", "0"], "time limit 0.0"),
        (["--kernel", "fast"], "kernel 'fast'"),
        (["--n", "0"], "n '0'"),
    ],
)
def test_bad_options_are_one_line(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["tune", *words])
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "portable"])
def test_the_command_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Every candidate runs and is right; and the next product takes what was found."""
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path))
    tuned.table.cache_clear()
    words = ["--shapes", "4096x4096", "--sparsity", "0.5,0.8", "--n", "8,16,32,64,128,192,256", "--kernel", kernel]
    result = CliRunner().invoke(app, ["tune", *words])
    try:
        assert result.exit_code == 0, result.output
        rows = json.loads(tuned.path(0).read_text())["plans"]
        assert {row["kernel"] for row in rows} == {kernel}
        assert all(0 < row["us"] <= row["usual_us"] for row in rows)
        for row in rows:
            weight = random_targets([(4096, 4096)], [round(row["sparsity"], 1)])[0].make(torch.device("cuda", 0))
            with choice.using(kernel):
                chosen = cuda.plan_for(weight, row["n"])
            assert tuned.choice_of(chosen)[0] == row["warps"]
    finally:
        tuned.table.cache_clear()
        cuda.forget_plans()
