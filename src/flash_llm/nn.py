"""SparseLinear, and replacing a model's linear layers by it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm import ops
from flash_llm.errors import SlowPathWarning
from flash_llm.layers import bias_of, is_packable, is_turned, matrix
from flash_llm.staying_dense import output_layer, staying_dense
from flash_llm.tensor import PackedWeight, ValueKind, empty_state, parse_metadata
from flash_llm.tensor.layout import VALUE_DTYPES

BUFFERS = {
    "bitmap": "weight_bitmap",
    "values": "weight_values",
    "offsets": "weight_offsets",
    "scales": "weight_scales",
}
"""PackedWeight's tensors and the buffers of SparseLinear, and so of a checkpoint, that hold them. Scales are there with
8-bit values alone."""

EXPANDED = (
    "expanded to dense: on a CPU there is no kernel that multiplies from compressed weights. The results are the same; "
    "memory and speed are those of the dense model. Use a GPU for the gain."
)
"""What is said where weights are, of the layers."""

TRANSPOSED = "transposed"
"""Recorded of a layer whose dense weight is [inputs, outputs]."""

DEFAULT_SKIP = (r"(^|\.)lm_head$", r"(^|\.)embed_out$", r"(^|\.)score$")
"""Layers that stay dense unless asked: regular expressions searched in the layers' names. They stand for the output
layer, which stays dense with them whatever its name is."""


class SparseLinear(nn.Module):
    """A linear layer whose weight stays packed. Takes x [..., in_features], gives [..., out_features].

    On a GPU it multiplies from the packed weight. On a CPU there is no kernel for that: the weight is expanded once,
    and a :class:`SlowPathWarning` says so.
    """

    weight_bitmap: Tensor
    weight_values: Tensor
    weight_offsets: Tensor
    weight_scales: Tensor | None

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """From what ``PackedWeight.metadata()`` says; without ``tensors`` an empty layer on the meta device.

        With ``"transposed": True`` among the metadata the layer stands in the place of one whose dense weight is
        [in_features, out_features], transformers' ``Conv1D``.
        """
        super().__init__()
        fields = parse_metadata(metadata)
        self.out_features, self.in_features = fields["shape"]
        self.tile_words: int = fields["tile_words"]
        self.max_packets: int = fields["max_packets"]
        self.packed_dtype: torch.dtype = fields["dtype"]
        self.dtype = self.packed_dtype
        self.metadata = dict(metadata)
        state: Mapping[str, Tensor | None] = {"scales": None, **(tensors or empty_state(metadata))}
        for name, tensor in state.items():
            self.register_buffer(BUFFERS[name], tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._dense: Tensor | None = None

    @classmethod
    def from_packed(cls, weight: PackedWeight, bias: Tensor | None = None, transposed: bool = False) -> SparseLinear:
        return cls(weight.metadata() | orientation(transposed), weight.tensors(), bias)

    @classmethod
    def from_linear(cls, linear: nn.Module, values: str | ValueKind = ValueKind.BITS16) -> SparseLinear:
        """Packs a dense layer, an ``nn.Linear`` or transformers' ``Conv1D``, on its own device.

        Takes ``values`` and raises as :meth:`PackedWeight.from_dense`.
        """
        weight = PackedWeight.from_dense(matrix(linear).detach(), values=values)
        return cls.from_packed(weight, bias_of(linear), is_turned(linear))

    @property
    def transposed(self) -> bool:
        """Whether the dense layer's weight is [in_features, out_features]."""
        return bool(self.metadata.get(TRANSPOSED))

    @property
    def packed(self) -> PackedWeight:
        """The weight, sharing this layer's memory unless it was cast to a dtype that packed weights can't have."""
        shape = (self.out_features, self.in_features)
        values, scales = self.weight_values, self.weight_scales
        if scales is None and values.dtype not in VALUE_DTYPES:
            values = values.to(self.packed_dtype)
        computed_in = None if scales is None else self.packed_dtype
        numbers = (self.tile_words, self.max_packets)
        return PackedWeight(
            shape, self.weight_bitmap, values, self.weight_offsets, *numbers, scales=scales, computed_in=computed_in
        )

    @property
    def weight(self) -> Tensor:
        """[0, in_features]: for models that ask for its dtype or initialise it. The weight is :attr:`packed`."""
        return self.weight_values.new_empty(0, self.in_features, dtype=self.dtype)

    def expand(self) -> None:
        """Expands the weight, on a CPU, where :meth:`forward` needs it dense. Does nothing a second time."""
        if self._dense is None:
            self._dense = self.packed.to_dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_bitmap.device.type == "cpu":
            if self._dense is None and not torch.compiler.is_compiling():
                _warn_expanded(1)
                self.expand()
            if self._dense is not None:
                return nn.functional.linear(x, self._dense, self.bias)
        return ops.linear(x, self.packed, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        before = (self.weight_values, self.weight_scales)
        # What becomes of the dtype, and so of 16-bit values; those of 8 bits and their scales keep theirs.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_values.device)).dtype
        super()._apply(fn, recurse)
        self._dense = None  # of the old device or dtype
        if before[1] is not None and self.weight_scales is not None:
            self.weight_values = _as_before(self.weight_values, before[0])
            self.weight_scales = _as_before(self.weight_scales, before[1])
        if self.dtype in VALUE_DTYPES:
            self.packed_dtype = self.dtype
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._dense = None  # of the old weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _as_before(moved: Tensor, before: Tensor) -> Tensor:
    """A tensor that was moved, with the dtype that it had before."""
    return moved if moved.dtype == before.dtype else before.to(moved.device)


@dataclass
class CompressReport:
    """What :func:`compress` did: layers' names, and why others stayed dense."""

    packed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


AFTER_COMPRESS: list[Callable[[nn.Module, CompressReport], None]] = []
"""Called with a model that :func:`compress` has changed: an integration that saves models has to know of it."""


def compress(
    model: nn.Module, skip: Iterable[str] = DEFAULT_SKIP, values: str | ValueKind = ValueKind.BITS16
) -> CompressReport:
    """Replaces a model's linear layers by :class:`SparseLinear`, in place.

    Layers whose weight others need as a tensor stay dense (``flash_llm.staying_dense``), and so do float32 ones among
    others of 16 bits. A model of transformers can be saved afterwards as a compressed folder, by ``save_pretrained``.

    Args:
        model: any module; its ``nn.Linear`` layers, and GPT-2's ``Conv1D``, are replaced, each on its own device.
        skip: regular expressions; a layer whose name one of them is found in stays dense.
        values: "16-bit"; or "float8_e4m3" or "int8", which nonzeros are rounded to, with a scale for each row.

    Returns:
        What was packed, and what was not and why.

    Raises:
        ValueError: the model has no linear layer at all, or is itself one; unknown ``values``.
        TypeError: a layer's weight is neither float16 nor bfloat16. The model is then as it was.
    """
    report = pack_linears(model, skip, values)
    for tell in AFTER_COMPRESS:
        tell(model, report)
    return report


def pack_linears(model: nn.Module, skip: Iterable[str], values: str | ValueKind) -> CompressReport:
    """:func:`compress`, but for telling transformers of it."""
    patterns, kind = [re.compile(pattern) for pattern in skip], ValueKind(values)
    report = CompressReport()
    must, head = staying_dense(model), output_layer(model)
    # Names and dtypes, no modules: so each dense weight's memory is free once it is replaced.
    found = ((name, module) for name, module in model.named_modules() if is_packable(module))
    linears = {name: module.get_parameter("weight").dtype for name, module in found}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers to compress")
    if is_packable(model):
        raise ValueError("the model is itself a linear layer: use SparseLinear.from_linear")
    for name, dtype in linears.items():
        reason = left_out(name, patterns, head) or must.get(name)
        if reason is not None:
            report.skipped[name] = reason
        elif dtype == torch.float32 and any(other in VALUE_DTYPES for other in linears.values()):
            report.skipped[name] = "it is in float32, and other layers are not"
        elif dtype not in VALUE_DTYPES:
            raise TypeError(
                f"{name} has weights of {dtype}, which can't be packed; convert the model to float16 or "
                f"bfloat16 first, or skip that layer"
            )
        else:
            report.packed.append(name)
    for name in report.packed:
        replace_module(model, name, SparseLinear.from_linear(model.get_submodule(name), kind))
    return report


def left_out(name: str, patterns: list[re.Pattern[str]], head: str | None) -> str | None:
    """Why a layer stays dense by what was asked to skip, if it does. ``head``: the name of the output layer."""
    matched = next((pattern.pattern for pattern in patterns if pattern.search(name)), None)
    if matched is not None:
        return f"its name matches {matched!r}"
    if name == head and set(DEFAULT_SKIP) <= {pattern.pattern for pattern in patterns}:
        return "it is the output layer"
    return None


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` in the place of the submodule called ``name``.

    Torch's own encoder layers have a quick way for inference that takes the weights out of their linear layers and
    multiplies by itself. They are told not to go it.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    while parent:
        module = model.get_submodule(parent)
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "its activation is another": one of the quick way's conditions
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        parent = parent.rpartition(".")[0]


def orientation(transposed: bool) -> dict[str, bool]:
    """What is recorded of a layer besides its packed weight."""
    return {TRANSPOSED: True} if transposed else {}


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
