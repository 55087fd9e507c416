"""A model's structure without its weights: which tensor of a checkpoint is the weight of which linear layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flash_llm.errors import CheckpointError
from flash_llm.layers import is_linear, is_packable, is_turned
from flash_llm.nn import BUFFERS
from flash_llm.staying_dense import output_layer, staying_dense
from flash_llm.tensor.layout import VALUE_DTYPES
from flash_llm.tensor_names import TensorNames


def meta_model(path: Path, architectures: Iterable[str] = ()) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device. Custom code is not run.

    Raises:
        CheckpointError: transformers doesn't know the architecture, or can't read the config.
    """
    model_class = next((getattr(transformers, name, None) for name in architectures), None)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            return (model_class._from_config if model_class else AutoModelForCausalLM.from_config)(config)
    except Exception as error:  # whatever a strange config makes transformers raise
        raise CheckpointError(
            f"{path} is no model that transformers {transformers.__version__} can build without custom code: {error}"
        ) from error


class PackedNames(TensorNames):
    """The same where linear layers may be packed, and then have other tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        for name, module in model.named_modules():
            if is_linear(module):
                self.state.update({f"{name}.{buffer}": True for buffer in BUFFERS.values()})

    def layer(self, name: str) -> str | None:
        """The module whose ``weight`` is the checkpoint's ``NAME.weight``, if a packed one finds its way there too."""
        target, pattern = self.target(f"{name}.weight")
        if target is None or pattern is not None or not target.endswith(".weight"):
            return None
        module = target.removesuffix(".weight")
        packed = {self.target(f"{name}.{buffer}") for buffer in BUFFERS.values()}
        return module if packed == {(f"{module}.{buffer}", None) for buffer in BUFFERS.values()} else None


@dataclass
class Linears:
    """A checkpoint's linear layers, by their names in the checkpoint.

    Attributes:
        layers: those whose weight is one tensor of the checkpoint, and the names of their modules.
        turned: those of them whose weight is [inputs, outputs] in the checkpoint.
        other: those that can't be packed, and why.
        head: the output layer, if it is one of ``layers``.
    """

    layers: dict[str, str] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)
    other: dict[str, str] = field(default_factory=dict)
    head: str | None = None


def find_linears(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> Linears:
    """Finds the linear layers of a model among a checkpoint's tensors.

    Raises:
        ValueError: the model has no linear layer.
        CheckpointError: a tensor's shape is not the one that the config calls for.
    """
    names = PackedNames(model)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers to compress")
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    in_float32 = kept_in_float32(model, torch.float16)
    must, head = staying_dense(model), output_layer(model)
    in_16_bits = any(linear.get_parameter("weight").dtype in VALUE_DTYPES for linear in linears.values())
    found, seen = Linears(), set()
    for tensor in shapes:
        target, pattern = names.target(tensor)
        if target is None or not tensor.endswith(".weight"):
            continue
        layer = tensor.removesuffix(".weight")
        if pattern is not None:
            if len(shapes[tensor]) == 2:
                found.other[target.removesuffix(".weight")] = "transformers fuses or splits its tensors at load"
            continue
        module = target.removesuffix(".weight")
        if module not in linears:
            continue
        seen.add(module)
        linear = linears[module]
        weight = linear.get_parameter("weight")
        expected = tuple(weight.shape)
        if shapes[tensor] != expected:
            raise CheckpointError(f"{tensor} is {list(shapes[tensor])}, but config.json makes it {list(expected)}")
        if not is_packable(linear):
            found.other[layer] = f"it is a special linear layer, {type(linear).__name__}"
        elif target in tied:
            found.other[layer] = "its weight is shared with another layer"
        elif module in must:
            found.other[layer] = must[module]
        elif in_float32(target) or (in_16_bits and weight.dtype == torch.float32):
            found.other[layer] = f"{type(model).__name__} keeps it in float32"
        elif names.layer(layer) != module:
            found.other[layer] = "transformers renames its tensors one by one at load"
        else:
            found.layers[layer] = module
            if is_turned(linear):
                found.turned.add(layer)
            if module == head:
                found.head = layer
    for name in linears:
        if name not in seen and f"{name}.weight" not in tied:
            found.other.setdefault(name, "its weight is not a tensor of its own in the checkpoint")
    return found


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a model of ``dtype`` keeps the parameter of a given name in float32."""
    strict = (model._keep_in_fp32_modules_strict or ()) if dtype in VALUE_DTYPES else ()
    lax = (model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    patterns = [re.compile(name.replace("*", ".*")) for name in (*strict, *lax)]
    return lambda name: any(pattern.search(name) for pattern in patterns)
