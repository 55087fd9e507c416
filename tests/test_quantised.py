"""8-bit values from the operators to whole models: computed as from the dequantised weight, stored, loaded, refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import flash_llm
from flash_llm import CheckpointError, FormatError, PackedWeight, SparseLinear, compress, ops
from flash_llm import checkpoint as ck
from flash_llm.folder import ModelFolder
from flash_llm.integrations.transformers import FlashLLMConfig
from flash_llm.nn import sparse_layers
from flash_llm.tensor import ValueKind
from sparse_matrices import DTYPES, bits, sparse
from tiny_models import logits, pruned_folder, pruned_model

pytestmark = pytest.mark.filterwarnings("ignore::flash_llm.errors.SlowPathWarning")
kinds = pytest.mark.parametrize("kind", ["float8_e4m3", "int8"])

ROWS, COLUMNS = 37, 200


def packed(kind: str, dtype: torch.dtype = torch.float16) -> PackedWeight:
    return PackedWeight.from_dense(sparse(ROWS, COLUMNS, 0.6, dtype), values=kind)


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


# The operators.


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_are_those_of_the_dequantised_matrix(kind: str, dtype: torch.dtype) -> None:
    weight = packed(kind, dtype)
    x, bias = normal(2, 3, COLUMNS, dtype=dtype), normal(ROWS, dtype=dtype)
    assert torch.equal(flash_llm.linear(x, weight, bias), F.linear(x, weight.to_dense(), bias))
    assert torch.equal(bits(ops.unpack(weight)), bits(weight.to_dense()))


@kinds
def test_torch_finds_the_operators_well_defined(kind: str) -> None:
    weight = ops._flat(packed(kind))
    x, bias = normal(5, COLUMNS).requires_grad_(), normal(ROWS).requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks = checks[kind == "float8_e4m3" :]  # the schema's check compares inputs by arithmetic that float8 hasn't
    torch.library.opcheck(torch.ops.flash_llm.linear.default, (x, bias, *weight), test_utils=checks)
    torch.library.opcheck(torch.ops.flash_llm.unpack.default, weight, test_utils=checks)


@kinds
def test_it_compiles_as_one_graph_with_gradients(kind: str) -> None:
    weight = packed(kind)

    def layer(x: Tensor) -> Tensor:
        return F.relu(flash_llm.linear(x * 2, weight))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (2, 5):
        x = normal(n, COLUMNS).requires_grad_()
        y, expected = compiled(x), F.relu(F.linear(x * 2, weight.to_dense()))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_x_of_another_dtype_and_values_of_another_are_refused() -> None:
    weight = packed("int8", torch.bfloat16)
    with pytest.raises(TypeError, match="x is torch.float16 but the weight is torch.bfloat16"):  # noqa: RUF043
        flash_llm.linear(normal(2, COLUMNS), weight)
    wide = PackedWeight(**vars(weight) | {"values": weight.values.half()})
    with pytest.raises(TypeError, match="holds float8_e4m3fn or int8 values with its scales"):
        flash_llm.linear(normal(2, COLUMNS, dtype=torch.bfloat16), wide)
    with pytest.raises(TypeError, match=r"a packed weight is one of float16 or bfloat16, not torch\.float32"):
        flash_llm.linear(normal(2, COLUMNS).float(), weight.in_dtype(torch.float32))


# SparseLinear.


def layer_of(kind: str, dtype: torch.dtype = torch.float16) -> SparseLinear:
    return SparseLinear.from_packed(packed(kind, dtype), normal(ROWS, dtype=dtype))


@kinds
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_casting_a_layer_changes_what_it_computes_in_and_no_stored_bit(kind: str, cast: torch.dtype) -> None:
    layer, before = layer_of(kind), packed(kind)
    layer.to(cast)
    assert torch.equal(layer.weight_values.view(torch.uint8), before.values.view(torch.uint8))
    assert layer.weight_scales is not None
    assert torch.equal(layer.weight_scales, before.scales)
    assert layer.dtype == cast
    x = normal(2, COLUMNS, dtype=cast)
    assert torch.equal(layer(x), F.linear(x, before.to_dense(cast), layer.bias))
    assert layer.half().dtype == torch.float16
    assert torch.equal(bits(layer.packed.to_dense()), bits(before.to_dense()))


@kinds
def test_a_layer_goes_through_a_state_dict_and_copies(kind: str) -> None:
    layer, other = layer_of(kind), SparseLinear(packed(kind).metadata(), bias=torch.empty(ROWS).half())
    other.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer)):
        assert torch.equal(same(normal(2, COLUMNS)), layer(normal(2, COLUMNS)))
    assert set(layer.state_dict()) - {"bias"} == {
        "weight_bitmap", "weight_values", "weight_offsets", "weight_scales",
    }  # fmt: skip
    assert "weight_scales" not in SparseLinear.from_packed(PackedWeight.from_dense(sparse(16, 64, 0.5))).state_dict()


@kinds
def test_compress_replaces_a_models_layers(kind: str) -> None:
    model = pruned_model("llama")
    dense = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    report = compress(model, values=kind)
    for name, layer in sparse_layers(model).items():
        assert layer.packed.kind.value == kind
        assert torch.equal(layer.packed.to_dense(), PackedWeight.from_dense(dense[name], values=kind).to_dense())
    assert len(report.packed) == len(sparse_layers(model)) == 14
    with pytest.raises(ValueError, match="values='int7'"):
        compress(pruned_model("llama"), values="int7")


# Folders.


@pytest.fixture(scope="module", params=["float8_e4m3", "int8"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(kind, compressed with that kind of values, the same decompressed)."""
    base = tmp_path_factory.mktemp(request.param)
    ck.compress_folder(pruned_folder(base / "dense"), base / "packed", values=request.param)
    ck.decompress_folder(base / "packed", base / "back")
    return request.param, base / "packed", base / "back"


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def test_a_folder_holds_the_rounded_weights_in_fewer_bytes(folders: tuple[str, Path, Path]) -> None:
    kind, folder, back = folders
    assert ck.verify_folder(folder)
    record = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert record["format_version"] == 3
    stored, dense = load_file(folder / "model.safetensors"), load_file(folder.parent / "dense/model.safetensors")
    rounded = load_file(back / "model.safetensors")
    for name, metadata in record["layers"].items():
        weight = PackedWeight.from_dense(dense[f"{name}.weight"], values=kind)
        assert metadata == weight.metadata()
        assert stored[f"{name}.weight_values"].dtype == ValueKind(kind).dtype
        assert torch.equal(rounded[f"{name}.weight"], weight.to_dense())
    for layer in (layer for layer in ck.read_folder(folder).layers if layer.packed):
        assert (layer.values, layer.dtype) == (kind, "bfloat16")
        assert layer.ratio < 0.55


@pytest.mark.parametrize("dtype", ["auto", torch.float16, torch.float32])
def test_transformers_loads_it_and_computes_as_with_the_rounded_weights(
    folders: tuple[str, Path, Path], dtype: Any
) -> None:
    kind, folder, back = folders
    model, dense = load(folder, dtype=dtype), load(back, dtype=dtype)
    assert {layer.packed.kind.value for layer in sparse_layers(model).values()} == {kind}
    assert model.dtype == dense.dtype
    if dtype == "auto":
        assert torch.equal(logits(model), logits(dense))
    else:  # not rounded to bfloat16 on the way, as the dense weights were
        torch.testing.assert_close(logits(model), logits(dense), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_save_pretrained_writes_the_same_bytes_back(
    folders: tuple[str, Path, Path], tmp_path: Path, dtype: Any
) -> None:
    _, folder, _ = folders
    load(folder, dtype=dtype).save_pretrained(tmp_path / "saved")
    ck.verify_folder(tmp_path / "saved")
    first, second = ModelFolder(folder), ModelFolder(tmp_path / "saved")
    assert sorted(first.names) == sorted(second.names)
    for name in (name for name in first.names if ".weight_" in name):
        assert torch.equal(first.read(name).view(torch.uint8), second.read(name).view(torch.uint8)), name
    assert first.config["quantization_config"]["layers"] == second.config["quantization_config"]["layers"]


@kinds
def test_transformers_packs_a_dense_folder_while_it_loads(kind: str, tmp_path: Path) -> None:
    dense = pruned_folder(tmp_path / "dense")
    model = load(dense, quantization_config=FlashLLMConfig(values=kind), dtype="auto")
    ck.compress_folder(dense, tmp_path / "packed", values=kind, min_sparsity=0)
    assert torch.equal(logits(model), logits(load(tmp_path / "packed", dtype="auto")))


def test_a_reader_of_version_1_would_refuse_it_and_this_one_refuses_a_newer(
    folders: tuple[str, Path, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[1] / "config.json").read_text())
    with pytest.raises(FormatError, match=r"format version 5; this release reads versions 1, 3 and 4: upgrade"):
        ck.folder_record(config | {"quantization_config": config["quantization_config"] | {"format_version": 5}})
    ck.compress_folder(folders[1].parent / "dense", tmp_path / "16")
    record = json.loads((tmp_path / "16/config.json").read_text())["quantization_config"]
    assert record["format_version"] == 1


@pytest.mark.parametrize("damage", [0.0, float("nan"), 2.0])
def test_damaged_scales_are_found(folders: tuple[str, Path, Path], tmp_path: Path, damage: float) -> None:
    broken = shutil.copytree(folders[1], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight_scales"][5] *= damage
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for check in (ck.verify_folder, load):
        with pytest.raises((CheckpointError, FormatError), match=rf"{name}: (scales\[5\]|.*checksum)"):
            check(broken)


def test_values_that_are_unknown_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    dense = pruned_folder(tmp_path / "dense")
    with pytest.raises(ValueError, match="values='int3': it takes one of '16-bit', 'float8_e4m3', 'int8'"):
        ck.compress_folder(dense, tmp_path / "out", values="int3")
    assert not (tmp_path / "out").exists()
