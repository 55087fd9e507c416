"""SparseLinear, and replacing a model's linear layers by it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from flash_llm import ops
from flash_llm.errors import SlowPathWarning
from flash_llm.tensor import PackedWeight, empty_state, parse_metadata
from flash_llm.tensor.layout import VALUE_DTYPES

BUFFERS = {"bitmap": "weight_bitmap", "values": "weight_values", "offsets": "weight_offsets"}
"""PackedWeight's tensors and the buffers of SparseLinear, and so of a checkpoint, that hold them."""

EXPANDED = (
    "expanded to dense: on a CPU there is no kernel that multiplies from compressed weights. The results are the same; "
    "memory and speed are those of the dense model. Use a GPU for the gain."
)
"""What is said where weights are, of the layers."""

DEFAULT_SKIP = (r"(^|\.)lm_head$", r"(^|\.)embed_out$", r"(^|\.)score$")
"""Layers that stay dense unless asked: regular expressions searched in the layers' names."""


class SparseLinear(nn.Module):
    """A linear layer whose weight stays packed. Takes x [..., in_features], gives [..., out_features].

    On a GPU it multiplies from the packed weight. On a CPU there is no kernel for that: the weight is expanded once,
    and a :class:`SlowPathWarning` says so.
    """

    weight_bitmap: Tensor
    weight_values: Tensor
    weight_offsets: Tensor

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """From what ``PackedWeight.metadata()`` says; without ``tensors`` an empty layer on the meta device."""
        super().__init__()
        fields = parse_metadata(metadata)
        self.out_features, self.in_features = fields["shape"]
        self.tile_words: int = fields["tile_words"]
        self.max_packets: int = fields["max_packets"]
        self.packed_dtype: torch.dtype = getattr(torch, metadata["dtype"])
        self.metadata = dict(metadata)
        for name, tensor in (tensors or empty_state(metadata)).items():
            self.register_buffer(BUFFERS[name], tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._dense: Tensor | None = None

    @classmethod
    def from_packed(cls, weight: PackedWeight, bias: Tensor | None = None) -> SparseLinear:
        return cls(weight.metadata(), weight.tensors(), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear:
        """Packs a dense layer, on its own device. Raises what :meth:`PackedWeight.from_dense` raises."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_packed(PackedWeight.from_dense(linear.weight.detach()), bias)

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this layer's memory unless it was cast to a dtype that packed weights can't have."""
        shape = (self.out_features, self.in_features)
        values = self.weight_values
        if values.dtype not in VALUE_DTYPES:
            values = values.to(self.packed_dtype)
        return PackedWeight(shape, self.weight_bitmap, values, self.weight_offsets, self.tile_words, self.max_packets)

    def expand(self) -> None:
        """Expands the weight, on a CPU, where :meth:`forward` needs it dense. Does nothing a second time."""
        if self._dense is None:
            self._dense = self.packed.to_dense().to(self.weight_values.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_bitmap.device.type == "cpu":
            if self._dense is None and not torch.compiler.is_compiling():
                _warn_expanded(1)
                self.expand()
            if self._dense is not None:
                return nn.functional.linear(x, self._dense, self.bias)
        return ops.linear(x, self.packed, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self._dense = None  # of the old device or dtype
        if self.weight_values.dtype in VALUE_DTYPES:
            self.packed_dtype = self.weight_values.dtype
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._dense = None  # of the old weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@dataclass
class CompressReport:
    """What :func:`compress` did: layers' names, and why others stayed dense."""

    packed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def compress(model: nn.Module, skip: Iterable[str] = DEFAULT_SKIP) -> CompressReport:
    """Replaces a model's linear layers by :class:`SparseLinear`, in place.

    Args:
        model: any module; its ``nn.Linear`` layers are replaced, each on its own device.
        skip: regular expressions; a layer whose name one of them is found in stays dense.

    Returns:
        What was packed, and what was not and why.

    Raises:
        ValueError: the model has no linear layer at all, or is itself one.
        TypeError: a layer's weight is neither float16 nor bfloat16. The model is then as it was.
    """
    patterns = [re.compile(pattern) for pattern in skip]
    report = CompressReport()
    # Names and dtypes, no modules: so each dense weight's memory is free once it is replaced.
    linears = {name: module.weight.dtype for name, module in model.named_modules() if type(module) is nn.Linear}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers to compress")
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a linear layer: use SparseLinear.from_linear")
    for name, dtype in linears.items():
        matched = next((p.pattern for p in patterns if p.search(name)), None)
        if matched is not None:
            report.skipped[name] = f"its name matches {matched!r}"
        elif dtype not in VALUE_DTYPES:
            raise TypeError(
                f"{name} has weights of {dtype}, which can't be packed; convert the model to float16 or "
                f"bfloat16 first, or skip that layer"
            )
        else:
            report.packed.append(name)
    for name in report.packed:
        replace_module(model, name, SparseLinear.from_linear(cast(nn.Linear, model.get_submodule(name))))
    return report


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` in the place of the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """All SparseLinear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def expand_on_cpu(model: nn.Module) -> int:
    """Expands the layers that are on the CPU, says so in one warning, and returns their number."""
    layers = [layer for layer in sparse_layers(model).values() if layer.weight_bitmap.device.type == "cpu"]
    for layer in layers:
        layer.expand()
    if layers:
        _warn_expanded(len(layers))
    return len(layers)


def _warn_expanded(layers: int) -> None:
    warnings.warn(f"{layers} compressed layer(s) {EXPANDED}", SlowPathWarning, stacklevel=3)
