"""Each mistake is answered in words, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_llm.errors import CheckpointError
from flash_llm.prune import CalibrationConfig, prune_folder

Make = Callable[..., Path]


def refuse(error: type[Exception], words: str, source: Path, out: Path, *args: Any, **kwargs: Any) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=words):
        prune_folder(source, out, *args, progress=False, **kwargs)
    assert sorted(out.parent.rglob("*")) == before


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder with one shard."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50, float("nan")])
def test_sparsity_out_of_range(sparsity: float, make_model: Make, tmp_path: Path) -> None:
    refuse(ValueError, "sparsity=.* less than 1", make_model("llama"), tmp_path / "out", "magnitude", sparsity)


def test_unknown_method(make_model: Make, tmp_path: Path) -> None:
    refuse(
        ValueError,
        "Unknown pruning method 'wander'; known are alps, magnitude, sparsegpt, wanda",
        make_model("opt"),
        tmp_path / "out",
        "wander",
    )


def test_missing_calibration(make_model: Make, tmp_path: Path) -> None:
    refuse(ValueError, "needs calibration text", make_model("opt"), tmp_path / "out", "wanda")


def test_no_such_folder(tmp_path: Path) -> None:
    refuse(FileNotFoundError, "nowhere does not exist", tmp_path / "nowhere", tmp_path / "out")


def test_a_folder_that_is_no_model(make_model: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(CheckpointError, "no config.json", tmp_path / "empty", tmp_path / "out")
    source = make_model("llama", shard="1GB")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuse(CheckpointError, "only safetensors are read", source, tmp_path / "out")
    (source / "config.json").write_text('{"model_type": "unheard-of"}')
    refuse(CheckpointError, "config.json is not one", source, tmp_path / "out")
    (source / "config.json").write_text("{")
    refuse(CheckpointError, "config.json is not one", source, tmp_path / "out")


def test_a_model_of_another_kind(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    (source / "config.json").write_text('{"model_type": "vit"}')
    refuse(CheckpointError, "no causal language model", source, tmp_path / "out", "magnitude")


def test_output_is_not_overwritten(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    refuse(FileExistsError, "not an empty folder", source, source, "magnitude")
    file = tmp_path / "file"
    file.touch()
    refuse(FileExistsError, "not an empty folder", source, file, "magnitude")
    (tmp_path / "out").mkdir()
    prune_folder(source, tmp_path / "out", "magnitude", progress=False)


def test_not_enough_disk(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 1000

    monkeypatch.setattr("flash_llm.prune.folder.shutil.disk_usage", lambda path: Usage())
    refuse(OSError, "Not enough disk", make_model("llama"), tmp_path / "out", "magnitude")


def test_damaged_weights(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    shard = sorted(source.glob("*.safetensors"))[2]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    refuse(CheckpointError, f"{shard.name} is truncated or damaged", source, tmp_path / "out", "magnitude")
    shard.write_bytes(b"\xff" * 8 + data[8:])
    refuse(CheckpointError, f"{shard.name} is truncated or damaged", source, tmp_path / "out", "magnitude")
    shard.unlink()
    refuse(CheckpointError, f"{shard.name} is missing", source, tmp_path / "out", "magnitude")
    index = source / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    refuse(CheckpointError, "outside the folder", source, tmp_path / "out", "magnitude")
    index.write_text("[]")
    refuse(CheckpointError, "is damaged", source, tmp_path / "out", "magnitude")


def test_weights_that_do_not_fit_the_config(make_model: Make, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = make_model("llama", shard="1GB")
    edit(source, lambda tensors: tensors.update({name: torch.zeros(3, 4)}))
    refuse(
        CheckpointError, r"up_proj.weight is \[3, 4\], but config.json makes it \[50, 36\]", source, tmp_path / "out"
    )
    edit(source, lambda tensors: tensors.pop(name))
    refuse(CheckpointError, f"has no tensor for {name}", source, tmp_path / "out")


def test_integer_and_quantised_weights(make_model: Make, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = make_model("llama", shard="1GB")
    edit(source, lambda tensors: tensors.update({name: torch.zeros(50, 36, dtype=torch.int8)}))
    refuse(CheckpointError, "is stored as I8", source, tmp_path / "out", "magnitude")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refuse(CheckpointError, "quantised or packed already", source, tmp_path / "out", "magnitude")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad: float, make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama", shard="1GB")
    edit(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7:8].fill_(bad))
    with pytest.raises(ValueError, match=r"up_proj\.weight of .* has NaN or infinite values"):
        prune_folder(source, tmp_path / "out", "magnitude", progress=False)


def test_activations_that_overflow(make_model: Make, text: Path, tmp_path: Path) -> None:
    source = make_model("llama", shard="1GB")
    edit(source, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].fill_(1e38))
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\..* overflow or are NaN"):
        prune_folder(source, tmp_path / "out", calibration=CalibrationConfig(str(text), 2, 8), progress=False)


def test_a_model_without_linear_layers(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_llm.prune.skeleton.Skeleton.linears", lambda self, prefix: {})
    refuse(ValueError, "no linear layers", make_model("llama"), tmp_path / "out", "magnitude")


def test_skip_patterns(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    refuse(ValueError, "no regular expression", source, tmp_path / "out", "magnitude", skip=["("])
    refuse(ValueError, "'q_prj' is found in no layer", source, tmp_path / "out", "magnitude", skip=["q_prj"])
    refuse(ValueError, "leaves no layer", source, tmp_path / "out", "magnitude", skip=["proj"])


def test_a_tied_head_is_not_pruned(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama", tie_word_embeddings=True)
    refuse(ValueError, "shares its weight", source, tmp_path / "out", "magnitude", include_lm_head=True)
    prune_folder(source, tmp_path / "out", "magnitude", progress=False)


def test_calibration_that_does_not_fit_the_model(make_model: Make, text: Path, tmp_path: Path) -> None:
    source = make_model("llama")
    too_long = CalibrationConfig(str(text), 2, 65)
    refuse(ValueError, "seqlen=65 is longer than the model's 64", source, tmp_path / "out", calibration=too_long)
    small = make_model("llama", vocab_size=64)
    calibration = CalibrationConfig(str(text), 2, 8)
    refuse(CheckpointError, "belongs to another model", small, tmp_path / "out", calibration=calibration)
    for file in source.glob("tokenizer*"):
        file.unlink()
    refuse(CheckpointError, "no usable tokenizer", source, tmp_path / "out", calibration=calibration)
