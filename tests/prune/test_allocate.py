"""How sparsity is spread over the layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_llm.prune import ALPS, OWL, CalibrationConfig, Given, LeastError, Magnitude, Uniform, Wanda, prune_folder
from flash_llm.prune.allocate import ALLOCATIONS, Allocation, Block
from flash_llm.prune.job import Stages
from flash_llm.prune.statistics import InputNorm

Make = Callable[..., Path]
SIZES = [{"a": 100, "b": 300}, {"c": 100, "d": 300}, {}, {"e": 1000}]


def total(shares: Mapping[str, float]) -> float:
    return sum(shares[name] * n for block in SIZES for name, n in block.items()) / 1800


def curves(generator: torch.Generator, points: list[float]) -> list[Any]:
    """Errors that grow with the sparsity, each layer's in its own way."""
    return [
        {
            name: [[s, float(e)] for s, e in zip(points, torch.rand(5, generator=generator).cumsum(0), strict=True)]
            for name in block
        }
        for block in SIZES
    ]


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 0.98), st.integers(0, 2**31))
def test_every_allocation_drops_what_was_asked_for(sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    allocation = LeastError()
    shares = allocation.spread(curves(generator, allocation._grid(sparsity)), SIZES, sparsity)
    assert total(shares) == pytest.approx(sparsity)
    assert all(sparsity - 0.1501 <= share <= sparsity + 0.1501 for share in shares.values())
    owl = OWL().spread(torch.rand(4, generator=generator).tolist(), SIZES, sparsity)
    assert total(owl) == pytest.approx(sparsity)
    assert all(0 <= share <= 0.99 + 1e-9 for share in [*shares.values(), *owl.values()])
    assert set(Uniform().spread([], SIZES, sparsity).values()) == {sparsity}


def test_least_error_is_the_least() -> None:
    """Against every choice of the grid's points with the same total, where the curves are convex."""
    points = [0.4, 0.5, 0.6]
    surveys = [{"a": [[0.4, 0.0], [0.5, 1.0], [0.6, 3.0]], "b": [[0.4, 0.0], [0.5, 0.2], [0.6, 0.5]]}]
    surveys += [{"c": [[0.4, 1.0], [0.5, 1.1], [0.6, 1.6]]}]
    sizes = [{"a": 10, "b": 10}, {"c": 10}]

    def error(shares: Mapping[str, float]) -> float:
        return sum(
            next(e for s, e in curve if abs(s - shares[name]) < 1e-9)
            for block in surveys
            for name, curve in block.items()
        )

    got = LeastError(reach=0.1, points=3).spread(surveys, sizes, 0.5)
    others = [dict(zip("abc", (x, y, z), strict=True)) for x in points for y in points for z in points]
    best = min(error(shares) for shares in others if sum(shares.values()) == pytest.approx(1.5))
    assert error(got) == pytest.approx(best)
    # A layer of ten times the weights pays ten times as much for a drop of the same height.
    assert LeastError(reach=0.1, points=3).spread(surveys, [{"a": 10, "b": 10}, {"c": 100}], 0.5)["c"] > got["c"]


def test_owl_is_the_paper() -> None:
    """Densities in proportion to the outliers, 2 lambda from the most to the fewest."""
    sizes = [{"a": 4}, {"b": 4}, {"c": 4}]
    shares = OWL(reach=0.08).spread([0.1, 0.3, 0.2], sizes, 0.7)
    assert shares == pytest.approx({"a": 0.78, "b": 0.62, "c": 0.7})
    assert OWL().spread([0.2, 0.2, 0.2], sizes, 0.7) == pytest.approx(dict.fromkeys("abc", 0.7))

    weight, x = torch.ones(2, 4), torch.ones(3, 4)
    weight[0, 0] = 100.0
    norm = InputNorm()
    norm.add(norm.measure(x), 3)
    block = Block({"a": weight}, {"a": norm}, lambda name, weight: None, lambda n: iter(()))
    assert OWL(threshold=5).survey(block, Wanda(), 0.7) == 1 / 8


def test_an_error_curve_is_of_the_blocks_outputs() -> None:
    weight = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    held = {"a": weight}

    def outputs(n: int) -> Any:
        return iter([x @ held["a"].T])

    block = Block({"a": weight}, {"a": None}, held.__setitem__, outputs)
    curve = LeastError(reach=0.25, points=2).survey(block, Magnitude(), 0.25)["a"]
    # At 0.5 the 1 and the 2 have gone: 1 of the first token's 9 + 1, and 4 of the second's 16 + 4.
    assert curve == [[0.0, 0.0], [0.5, pytest.approx((1 / 10 + 4 / 20) / 2)]]
    assert held["a"] is weight


@pytest.mark.parametrize("allocation", ["owl", "error"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "alps"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_folder_is_pruned_unevenly_to_the_same_total(
    architecture: str, method: str, allocation: str, make_model: Make, text: Path, tmp_path: Path
) -> None:
    calibration = CalibrationConfig(str(text), samples=4, seqlen=32)
    report = prune_folder(
        make_model(architecture),
        tmp_path / "out",
        method,
        0.6,
        allocation=allocation,
        calibration=calibration,
        progress=False,
    )
    assert report.zeros / report.weights == pytest.approx(0.6, abs=0.02)  # Wanda's rows are 36 and 50 long
    assert len({round(layer.sparsity, 2) for layer in report.layers.values()}) > 1
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["allocation"] == repr(ALLOCATIONS[allocation]())


def test_error_spares_the_layer_that_matters(make_model: Make, text: Path, tmp_path: Path) -> None:
    source = make_model("llama", shard="1GB")
    name = "model.layers.1.mlp.down_proj"
    tensors: dict[str, Tensor] = load_file(source / "model.safetensors")
    tensors[name + ".weight"] *= 30
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1e-3
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = prune_folder(
        source,
        tmp_path / "out",
        "sparsegpt",
        0.5,
        allocation=LeastError(windows=2),
        calibration=CalibrationConfig(str(text), samples=4, seqlen=32),
        progress=False,
    )
    shares = {name: layer.sparsity for name, layer in report.layers.items()}
    assert shares["model.layers.2.mlp.down_proj"] == pytest.approx(0.65, abs=0.01)
    assert shares[name] < shares["model.layers.2.mlp.down_proj"]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_survey_that_was_cut_off_goes_on(
    stage: int, make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calibration = make_model("llama"), CalibrationConfig(str(text), samples=4, seqlen=32)

    def run(out: Path) -> None:
        prune_folder(source, out, ALPS(), 0.6, allocation="error", calibration=calibration, progress=False)

    finish = Stages.finish

    def cut(self: Stages, index: int, *rest: Any) -> None:
        finish(self, index, *rest)
        if self.folder.name == "survey" and index == stage:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "finish", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    run(tmp_path / "cut")
    run(tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()


def test_sparsities_of_another_run_are_taken_as_they_are(make_model: Make, text: Path, tmp_path: Path) -> None:
    source, calibration = make_model("llama"), CalibrationConfig(str(text), samples=4, seqlen=32)
    arguments: dict[str, Any] = {"calibration": calibration, "progress": False}
    first = prune_folder(source, tmp_path / "first", "sparsegpt", 0.6, allocation="error", **arguments)
    shares = {name: layer.sparsity for name, layer in first.layers.items()}
    again = prune_folder(source, tmp_path / "again", "sparsegpt", 0.6, allocation=Given(shares), **arguments)
    assert again.layers == first.layers
    name = next(iter(shares))
    with pytest.raises(ValueError, match=f"{name} has the sparsity None"):
        prune_folder(
            source,
            tmp_path / "bad",
            "sparsegpt",
            allocation=Given({k: v for k, v in shares.items() if k != name}),
            **arguments,
        )


def test_what_can_not_be_spread_is_refused(make_model: Make, text: Path, tmp_path: Path) -> None:
    source = make_model("opt")
    with pytest.raises(ValueError, match="Unknown allocation 'fair'; known are error, owl, uniform"):
        prune_folder(source, tmp_path / "out", allocation="fair")
    with pytest.raises(ValueError, match="Allocation 'owl' needs calibration text"):
        prune_folder(source, tmp_path / "out", "magnitude", allocation="owl")
    with pytest.raises(ValueError, match=r"reach=0 must be in \(0, 1\)"):
        LeastError(reach=0)
    with pytest.raises(ValueError, match="threshold=-1 must be positive"):
        OWL(threshold=-1)
    assert all(isinstance(make(), Allocation) and make().name == name for name, make in ALLOCATIONS.items())
