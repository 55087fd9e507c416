"""A model in memory to be trained, and which of its weights are pruned layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flash_llm.errors import CheckpointError
from flash_llm.prune.folder import RECORD
from flash_llm.prune.retrain.config import RetrainConfig
from flash_llm.prune.skeleton import Skeleton, block_names
from flash_llm.prune.source import SourceFolder
from flash_llm.tensor_names import TensorNames


def open_source(folder: Path) -> SourceFolder:
    """A dense folder, pruned or not.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: it is no model's, is damaged, or its weights are packed.
    """
    config = folder / "config.json"
    if config.is_file():
        try:
            stored = json.loads(config.read_text(encoding="utf-8"))
            method = (stored.get("quantization_config") or {}).get("quant_method")
        except (ValueError, AttributeError):
            method = None  # SourceFolder says what is wrong
        if method == "flash_llm":
            raise CheckpointError(
                f"{folder} is compressed, and only dense weights can be trained: "
                f"flash-llm decompress {folder} --out DENSE first, and retrain that."
            )
    return SourceFolder(folder)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What ``pruning.json`` says; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(layer["tensor"], str) for layer in record["layers"].values()):
            raise ValueError("a layer's tensor has no name")
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def load_model(source: SourceFolder, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder on a device, in evaluation mode.

    Raises:
        CheckpointError: transformers can't load it.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{source.folder} can't be loaded by transformers: {error}") from error
    return _placed(model, device)


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    nn.Module.to(model, device)
    return model.eval()


def load_teacher(
    folder: Path, source: SourceFolder, tokenizer: Any, device: torch.device, home: torch.device
) -> nn.Module:
    """The model to distil from, frozen: bfloat16 on a GPU, float32 on a CPU, where bfloat16 would be slower.

    Args:
        device: that it will run on.
        home: that it is loaded to.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: it is no model's.
        ValueError: its tokens aren't the trained model's.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Teacher {folder} does not exist; name the folder of the dense model.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"Teacher {folder} is no Hugging Face model folder: it has no config.json.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    own = source.config.get_text_config().vocab_size
    if config.vocab_size != own:
        raise ValueError(
            f"Teacher {folder} knows {config.vocab_size} tokens, {source.folder} {own}: a model can only be distilled "
            "from one with the same vocabulary."
        )
    try:
        other = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        other = None  # a folder of weights alone; the sizes are the same
    if other is not None and other != tokenizer.get_vocab():
        raise ValueError(f"Teacher {folder} has another tokenizer than {source.folder}: its tokens mean other words.")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return _placed(teacher, home).requires_grad_(False)


def masked_layers(source: SourceFolder, skeleton: Skeleton, config: RetrainConfig) -> dict[str, str]:
    """The layers whose zeros are held, and the stored names of their weights.

    Those that the pruning record names; without a record those of the blocks, if they are to be pruned now.

    Raises:
        CheckpointError: there are none, or a layer isn't in the model.
        ValueError: the model is pruned, though it is said to be dense.
    """
    record = read_record(source.folder)
    if config.dense:
        if record is not None and any(layer.get("zeros") for layer in record["layers"].values()):
            raise ValueError(f"{source.folder} is pruned, and dense=True would fill its zeros: leave it out.")
        return {}
    if record is not None:
        names = list(record["layers"])
    elif config.sparsity is not None:
        names = [name for block in skeleton.block_names for name in skeleton.linears(block)]
    else:
        raise CheckpointError(
            f"{source.folder} is not pruned: it has no {RECORD}. Prune it first; or train it as it is, for comparison "
            "(dense), or prune it while training (sparsity)."
        )
    known = {name for name, _ in skeleton.model.named_modules()}
    for name in names:
        if name not in known:
            raise CheckpointError(f"{source.folder / RECORD} names {name}, which the model doesn't have.")
    return {name: skeleton.check_weight(name) for name in names}


def stored_names(model: PreTrainedModel, source: SourceFolder) -> dict[str, str]:
    """For each tensor of the folder that is a parameter of the model, the parameter's name. Tied ones have several.

    Raises:
        CheckpointError: a parameter is stored under no name, so that it could not be written again.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = TensorNames(model)
    names: dict[str, str] = {}
    for key in source.names:
        name, pattern = targets.target(key)
        if name in parameters and pattern is None:
            names[key] = name
    homes = {id(parameters[name]) for name in names.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in homes:
            raise CheckpointError(
                f"{source.folder} stores no tensor for {name}: this architecture ({source.config.model_type}) keeps "
                "its weights in another way, and can't be retrained yet."
            )
    return names


def compile_blocks(model: nn.Module) -> None:
    """Compile a model's blocks, in place. They are alike, so that they share what is compiled, in seconds."""
    for name in block_names(model):
        model.get_submodule(name).compile(dynamic=False)
