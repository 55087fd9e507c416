"""Pruning to 8-bit values: weights make up for each other's rounding, and what is compressed is just that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flash_llm.checkpoint import compress_folder, load_packed, read_folder
from flash_llm.prune import ALPS, CalibrationConfig, Pruner, SparseGPT, Wanda, prune_folder
from flash_llm.prune.hessian import damped, relative_error
from flash_llm.prune.quantise import DAMPING, descend, quantise
from flash_llm.prune.statistics import Hessian, InputNorm
from flash_llm.tensor import ValueKind
from flash_llm.tensor.quantise import SCALES, choose_scales, is_rounded, rounded

Make = Callable[..., Path]
KINDS = [ValueKind.E4M3, ValueKind.INT8]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)


def problem(rows: int, columns: int, seed: int, tokens: int = 1000) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that depend on each other and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, (columns + 1) // 2, generator=generator)
    x = hidden @ torch.randn(hidden.shape[1], columns, generator=generator) / hidden.shape[1] ** 0.5
    x = (x + 0.5 * torch.randn(x.shape, generator=generator)) * (0.3 + torch.rand(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), x


def hessian_of(x: Tensor) -> Hessian:
    statistic = Hessian()
    statistic.add(statistic.measure(x), len(x))
    return statistic


@kinds
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("method", [SparseGPT(), ALPS()], ids=lambda method: method.name)
def test_the_error_is_less_than_that_of_pruning_and_then_rounding(
    method: Pruner, sparsity: float, kind: ValueKind
) -> None:
    weight, x = problem(48, 160, 0)
    pruned = method.prune(weight, hessian_of(x), sparsity)
    joint = quantise(weight, pruned, hessian_of(x), kind)
    plain = rounded(pruned, choose_scales(pruned, kind), kind)
    errors = [relative_error(weight, found, x.T @ x) for found in (pruned, joint.weight, plain)]
    # Of what rounding adds to the error, with float8 a fair part is made up for; int8 adds next to nothing.
    share = 0.85 if kind is ValueKind.E4M3 else 1.0
    assert errors[1] - errors[0] <= share * (errors[2] - errors[0])
    assert torch.equal(joint.scales, choose_scales(pruned, kind))
    assert is_rounded(joint.weight, joint.scales, kind)
    assert not bool(joint.weight[pruned == 0].any())


@kinds
@pytest.mark.parametrize("seed", range(5))
def test_no_step_makes_any_row_worse(kind: ValueKind, seed: int) -> None:
    """From any start, with any mask; and what no single step can improve is left as it is."""
    weight, x = problem(12, 150, seed)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(weight.shape, generator=generator) < 0.5
    scales = choose_scales(weight * kept, kind) * 1.3
    hessian = x.T @ x

    def error(values: Tensor) -> Tensor:
        difference = (weight - values).double()
        return ((difference @ damped(hessian, DAMPING).double()) * difference).sum(dim=1)

    values = [rounded(torch.randn(weight.shape, generator=generator) * kept, scales, kind)]
    for _ in range(6):
        values.append(descend(values[-1], weight, kept, scales, kind, hessian, passes=1))
    errors = [error(found) for found in values]
    assert all(bool((after <= before * (1 + 1e-6)).all()) for before, after in pairwise(errors))
    end = descend(values[-1], weight, kept, scales, kind, hessian, passes=40)
    assert torch.equal(descend(end, weight, kept, scales, kind, hessian, passes=1), end)


@kinds
def test_a_layer_without_a_hessian_is_rounded_to_nearest(kind: ValueKind) -> None:
    weight, x = problem(16, 64, 1)
    norm = InputNorm()
    norm.add(norm.measure(x), len(x))
    pruned = Wanda().prune(weight, norm, 0.5)
    for statistics in (norm, None):
        found = quantise(weight, pruned, statistics, kind)
        assert torch.equal(found.weight, rounded(pruned, choose_scales(pruned, kind), kind))


@kinds
def test_weights_of_inputs_that_were_never_seen_are_rounded_to_nearest(kind: ValueKind) -> None:
    weight, x = problem(16, 64, 2)
    x[:, 10:20] = 0
    pruned = weight.masked_fill(weight.abs() < 0.5, 0.0)
    found = quantise(weight, pruned, hessian_of(x), kind)
    plain = rounded(pruned, found.scales, kind)
    assert torch.equal(found.weight[:, 10:20], plain[:, 10:20])
    assert relative_error(weight, found.weight, x.T @ x) < relative_error(weight, plain, x.T @ x)
    x[:] = 0
    assert torch.equal(quantise(weight, pruned, hessian_of(x), kind).weight, plain)


def options(text: Path, **changes: Any) -> dict[str, Any]:
    calibration = CalibrationConfig(str(text), samples=8, seqlen=32)
    return {"sparsity": 0.5, "calibration": calibration, "progress": False} | changes


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@kinds
def test_what_is_compressed_is_what_was_pruned(
    method: str, kind: ValueKind, make_model: Make, text: Path, tmp_path: Path
) -> None:
    """Not rounded again: the compressed model has the pruned one's weights, bit for bit."""
    source = make_model("llama", dtype=torch.bfloat16)
    report = prune_folder(source, tmp_path / "pruned", method, values=kind, **options(text))
    weights = {}
    for file in (tmp_path / "pruned").glob("model-*.safetensors"):
        weights |= load_file(file)
    scales = load_file(tmp_path / "pruned" / SCALES)
    assert set(scales) == {layer.tensor for layer in report.layers.values()}
    done = compress_folder(tmp_path / "pruned", tmp_path / "small", min_sparsity=0, progress=False)
    assert (done.values, done.notes) == (kind.value, [])
    for name in done.packed:
        packed = load_packed(tmp_path / "small", name)
        assert torch.equal(packed.to_dense(), weights[f"{name}.weight"])
        assert torch.equal(packed.scales, scales[f"{name}.weight"])
        assert packed.sparsity >= 0.49
    assert not (tmp_path / "small" / SCALES).exists()
    assert read_folder(tmp_path / "small").pruning["values"] == kind.value
    # Also in another dtype, where they are rounded once more, and in other values, which take scales of their own.
    compress_folder(tmp_path / "pruned", tmp_path / "half", min_sparsity=0, dtype="float16", progress=False)
    assert torch.equal(load_packed(tmp_path / "half", name).values.float(), packed.values.float())
    exact = compress_folder(tmp_path / "pruned", tmp_path / "16", values="16-bit", min_sparsity=0, progress=False)
    assert exact.values == "16-bit"
    assert torch.equal(load_packed(tmp_path / "16", name).to_dense(), packed.to_dense())


def test_weights_that_were_changed_since_get_new_scales_and_that_is_said(
    make_model: Make, text: Path, tmp_path: Path
) -> None:
    source = make_model("llama", dtype=torch.bfloat16)
    prune_folder(source, tmp_path / "a", "magnitude", values="int8", **options(text))
    prune_folder(source, tmp_path / "b", "magnitude", sparsity=0.5, progress=False)
    for shard in (tmp_path / "a").glob("model-*.safetensors"):
        shutil.copy(tmp_path / "b" / shard.name, shard)
    with pytest.warns(UserWarning, match=r"is no longer what scales.safetensors was made for: new scales were chosen"):
        compress_folder(tmp_path / "a", tmp_path / "small", min_sparsity=0, progress=False)
    assert read_folder(tmp_path / "small").compressed


def test_an_interrupted_job_goes_on_with_the_same_scales(
    make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_llm.prune import folder

    source = make_model("llama")
    prune_folder(source, tmp_path / "whole", SparseGPT(), values="fp8", **options(text))
    advance, calls = folder.Walk.advance, []

    def stops(self: Any, index: int) -> None:
        calls.append(index)
        if index == 1:
            raise KeyboardInterrupt
        advance(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(folder.Walk, "advance", stops)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, tmp_path / "parts", SparseGPT(), values="fp8", **options(text))
    assert calls == [0, 1]
    with pytest.raises(FileExistsError, match="values: float8_e4m3 then, None now"):
        prune_folder(source, tmp_path / "parts", SparseGPT(), **options(text))
    assert prune_folder(source, tmp_path / "parts", SparseGPT(), values="fp8", **options(text)).resumed_stages == 1
    for name in (SCALES, *(file.name for file in (tmp_path / "whole").glob("model-*.safetensors"))):
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert all(torch.equal(first[key], second[key]) for key in first.keys() | second.keys())


def test_16_bit_pruning_leaves_no_trace_of_scales(make_model: Make, text: Path, tmp_path: Path) -> None:
    prune_folder(make_model("llama"), tmp_path / "out", "magnitude", **options(text))
    assert not (tmp_path / "out" / SCALES).exists()
    assert "values" not in json.loads((tmp_path / "out/pruning.json").read_text())
    with pytest.raises(ValueError, match="values='int3'"):
        prune_folder(make_model("llama"), tmp_path / "other", "magnitude", values="int3")
