"""Compressed folders in transformers: loaded, run, saved and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from flash_llm import CheckpointError, FormatError, SlowPathWarning, compress
from flash_llm.checkpoint import accept_config, compress_folder, read_folder, verify_folder
from flash_llm.folder import ModelFolder
from flash_llm.integrations.transformers import FlashLLMConfig
from flash_llm.nn import SparseLinear, sparse_layers
from tiny_models import CONFIGS, logits, pruned_folder

pytestmark = pytest.mark.filterwarnings("ignore::flash_llm.SlowPathWarning")


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture(scope="module", params=CONFIGS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense, compressed) of each architecture."""
    base = tmp_path_factory.mktemp(request.param)
    dense = pruned_folder(base / "dense", request.param)
    compress_folder(dense, base / "packed")
    return dense, base / "packed"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("llama")
    dense = pruned_folder(base / "dense")
    compress_folder(dense, base / "packed", max_shard_size="40KB")
    return dense, base / "packed"


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_those_of_the_dense_model(folders: tuple[Path, Path], dtype: Any) -> None:
    dense, packed = (load(folder, dtype=dtype) for folder in folders)
    assert len(sparse_layers(packed)) >= 8
    assert packed.dtype == dense.dtype
    assert {p.dtype for p in packed.parameters()} == {p.dtype for p in dense.parameters()}
    assert all(layer.weight_bitmap.dtype == torch.int32 for layer in sparse_layers(packed).values())
    ours, theirs = logits(packed), logits(dense)
    if any(layer.transposed for layer in sparse_layers(packed).values()):
        # GPT-2's layers multiply by the weight the other way round, which some CPUs sum in another order.
        torch.testing.assert_close(ours, theirs)
    else:
        assert torch.equal(ours, theirs)


def test_a_model_may_ask_for_its_layers_weights(tmp_path: Path) -> None:
    """GPTBigCode initialises them by name, packed or not."""
    dense = pruned_folder(tmp_path / "dense", "gpt_bigcode")
    compress_folder(dense, tmp_path / "packed")
    packed = load(tmp_path / "packed")
    layer = packed.get_submodule("transformer.h.0.mlp.c_proj")
    assert (layer.weight.dtype, layer.weight.numel()) == (torch.bfloat16, 0)
    assert "transformer.h.0.mlp.c_proj.weight" not in packed.state_dict()
    assert torch.equal(logits(packed), logits(load(dense)))


def test_a_linear_layer_of_a_models_own_kind(tmp_path: Path) -> None:
    """Falcon's differ from ``nn.Linear`` in rounding alone, and are packed; others aren't, since they do more."""
    dense = pruned_folder(tmp_path / "dense", "falcon", dtype=torch.float16)
    assert compress_folder(dense, tmp_path / "packed").skipped == {}
    packed = load(tmp_path / "packed")
    assert "transformer.h.0.mlp.dense_h_to_4h" in sparse_layers(packed)
    torch.testing.assert_close(logits(packed), logits(load(dense)), rtol=1e-2, atol=1e-2)


def test_generate(folders: tuple[Path, Path]) -> None:
    dense, packed = (load(folder, dtype=torch.float32) for folder in folders)
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(packed.generate(prompt, **options), dense.generate(prompt, **options))


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_save_pretrained_writes_the_same_folder_back(folders: tuple[Path, Path], tmp_path: Path, dtype: Any) -> None:
    model = load(folders[1], dtype=dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    verify_folder(tmp_path / "saved")
    first, second = ModelFolder(folders[1]), ModelFolder(tmp_path / "saved")
    assert sorted(first.names) == sorted(second.names)
    packed = [name for name in first.names if ".weight_" in name]
    for name in first.names if dtype == "auto" else packed:
        assert torch.equal(first.read(name), second.read(name)), name
    for part in ("layers", "dense", "pruning", "format_version"):
        assert first.config["quantization_config"][part] == second.config["quantization_config"][part]
    assert torch.equal(logits(load(tmp_path / "saved", dtype=dtype)), logits(model))


def test_a_changed_model_is_saved_as_it_now_is(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(llama[1])
    model.model.norm.weight.data *= 2
    model.to(torch.float16)
    model.save_pretrained(tmp_path / "saved")
    verify_folder(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.dtype == torch.float16
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Not bit for bit: model.to has rounded the frequencies of the rotary embedding, which no checkpoint holds.
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-2, atol=2e-3)


def test_one_warning_says_that_the_weights_are_expanded(llama: tuple[Path, Path]) -> None:
    with pytest.warns(SlowPathWarning) as caught:
        logits(load(llama[1]))
    assert [str(w.message)[:14] for w in caught if w.category is SlowPathWarning] == ["14 compressed "]


@pytest.mark.parametrize("first", ["import flash_llm; assert 'torch' not in sys.modules", "import transformers"])
def test_import_alone_registers(llama: tuple[Path, Path], first: str) -> None:
    code = f"""import sys; {first}; from transformers import AutoModelForCausalLM; import flash_llm
model = AutoModelForCausalLM.from_pretrained({str(llama[1])!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "SparseLinear", run.stderr


def test_without_this_package_loading_fails_instead_of_inventing_weights(llama: tuple[Path, Path]) -> None:
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(llama[1])!r}); print('loaded')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "loaded" not in run.stdout


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(llama: tuple[Path, Path], device_map: Any) -> None:
    pytest.importorskip("accelerate")
    model = load(llama[1], device_map=device_map)
    assert model.device.type == ("cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu")
    if model.device.type == "cpu":
        assert torch.equal(logits(model), logits(load(llama[0])))


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["auto", "cuda", {"": 0}])
def test_on_a_gpu(folders: tuple[Path, Path], device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    dense, packed = (load(folder, device_map=device_map) for folder in folders)
    prompt = torch.arange(3, 12, device="cuda")[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(prompt).logits, dense(prompt).logits, rtol=0.05, atol=0.02)
    packed.save_pretrained(tmp_path / "saved")
    verify_folder(tmp_path / "saved")
    with pytest.raises(ValueError, match="can't be multiplied from compressed weights"):
        load(folders[1], device_map=device_map, dtype=torch.float32)


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    dense = pruned_folder(tmp_path / "dense", "opt")
    weights = {name.removeprefix("model."): value for name, value in load_file(dense / "model.safetensors").items()}
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    report = compress_folder(dense, tmp_path / "packed")
    assert "decoder.layers.0.fc1" in report.packed
    for dtype in ("auto", torch.float32):
        model = load(tmp_path / "packed", dtype=dtype)
        assert torch.equal(logits(model), logits(load(dense, dtype=dtype)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_parts_of_a_model(llama: tuple[Path, Path]) -> None:
    ids = torch.arange(3, 12)[None]
    dense, packed = (AutoModel.from_pretrained(folder) for folder in llama)
    assert torch.equal(packed(ids).last_hidden_state, dense(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(llama[1], num_labels=3)
    assert classifier(ids).logits.shape == (1, 3)


@pytest.mark.parametrize("part", ["model", "model.layers", "model.layers.1.mlp"])
def test_a_model_of_which_a_part_was_compressed_is_saved_whole(
    llama: tuple[Path, Path], tmp_path: Path, part: str
) -> None:
    model = load(llama[0])
    assert getattr(model, "hf_quantizer", None) is None
    compress(model.get_submodule(part))
    model.save_pretrained(tmp_path / "saved")
    verify_folder(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert sparse_layers(again).keys() == sparse_layers(model).keys()
    assert torch.equal(logits(again), logits(load(llama[0])))


def test_a_part_of_a_compressed_model_is_saved(llama: tuple[Path, Path], tmp_path: Path) -> None:
    ids = torch.arange(3, 12)[None]
    model = load(llama[1])
    model.model.save_pretrained(tmp_path / "part")
    verify_folder(tmp_path / "part")
    part = AutoModel.from_pretrained(tmp_path / "part")
    assert torch.equal(part(ids).last_hidden_state, model.model(ids).last_hidden_state)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "whole")), logits(model))


def test_a_dense_model_is_packed_at_load(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(llama[0], quantization_config=FlashLLMConfig())
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert torch.equal(logits(model), logits(load(llama[0])))
    model.save_pretrained(tmp_path / "saved")
    verify_folder(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    with pytest.raises(TypeError, match="float32"):
        load(llama[0], quantization_config=FlashLLMConfig(), dtype=torch.float32)


def test_dequantize_gives_the_dense_model(llama: tuple[Path, Path]) -> None:
    model = load(llama[1]).dequantize()
    assert not sparse_layers(model)
    assert torch.equal(logits(model), logits(load(llama[0])))


def test_it_is_not_trainable(llama: tuple[Path, Path]) -> None:
    assert not load(llama[1]).hf_quantizer.is_trainable


def edited(folder: Path, target: Path, edit: Any) -> Path:
    """A copy of a folder whose config.json was edited and signed again."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_can_not_be_right_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    newer = edited(llama[1], tmp_path / "newer", lambda c: c["quantization_config"].update(format_version=7))
    with pytest.raises(FormatError, match=r"format version 7.*upgrade"):
        load(newer)

    unsigned = edited(llama[1], tmp_path / "unsigned", lambda c: c.update(rms_norm_eps=0.5))
    with pytest.raises(CheckpointError, match="accept_config"):
        load(unsigned)
    accept_config(unsigned)
    assert load(unsigned).config.rms_norm_eps == 0.5

    half = edited(llama[1], tmp_path / "half", lambda c: c["quantization_config"].pop("checksums"))
    with pytest.raises(CheckpointError, match=r"quantization_config in config.json is damaged"):
        load(half)

    bare = edited(llama[1], tmp_path / "bare", lambda c: c.update(quantization_config={"quant_method": "flash_llm"}))
    with pytest.raises(CheckpointError, match="nothing but a name"):
        load(bare)

    deeper = edited(llama[1], tmp_path / "deeper", lambda c: c.update(num_hidden_layers=1))
    accept_config(deeper)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has no linear layer for the packed model\.layers\.1"):
        load(deeper)

    wider = edited(llama[1], tmp_path / "wider", lambda c: c.update(intermediate_size=111))
    accept_config(wider)
    with pytest.raises(CheckpointError, match=r"packed .* is .72, 110., but"):
        load(wider)


@pytest.mark.parametrize("wrong", ["missing", "unknown"])
def test_missing_and_unknown_tensors_are_errors(llama: tuple[Path, Path], tmp_path: Path, wrong: str) -> None:
    compress_folder(llama[0], tmp_path / "packed")
    file = tmp_path / "packed/model.safetensors"
    tensors = load_file(file)
    if wrong == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.norm.bias"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        load(tmp_path / "packed")


@pytest.mark.slow
def test_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """The first six of SmolLM2's 30 layers, every other weight dropped."""
    dense = shutil.copytree(smollm2, tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    dropped = tuple(f"model.layers.{number}." for number in range(6, 30))
    weights = {
        name: weight for name, weight in load_file(dense / "model.safetensors").items() if not name.startswith(dropped)
    }
    for name, weight in weights.items():
        if "proj" in name:
            weight.masked_fill_(weight.abs() <= weight.abs().float().median().to(weight.dtype), 0.0)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    report = compress_folder(dense, tmp_path / "packed", max_shard_size="60MB")
    assert len(report.packed) == 42
    layers = [layer for layer in read_folder(tmp_path / "packed").layers if layer.packed]
    assert all(0.49 < layer.sparsity < 0.53 and layer.ratio < 0.65 for layer in layers)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "packed")), logits(load(dense)))
