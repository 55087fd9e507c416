"""The operators, registered with torch: they work under ``torch.compile(fullgraph=True)`` and in CUDA graphs.

``flash_llm::linear`` multiplies by a packed weight and ``flash_llm::unpack`` expands one. Both take the weight's
tensors and numbers one by one, since that is what torch's operators can take; :func:`linear` and :func:`unpack` are
the functions to call.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flash_llm.errors import SlowPathWarning
from flash_llm.kernels import reference
from flash_llm.tensor import PackedWeight
from flash_llm.tensor.layout import VALUE_DTYPES


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """y = x W^T + bias with a packed W.

    Accumulates in float32. From ``kernels.plan.unpack_from`` rows of x on the weight is expanded and torch multiplies,
    with its own settings for that. Differentiable with respect to x and bias.

    Args:
        x: [..., K], of the weight's dtype and on its device.
        weight: [M, K].
        bias: [M], of the same dtype, or None.
        relu: max(y, 0) in place of y, with no kernel of its own where nothing else, such as gradients, asks for y.

    Returns:
        [..., M] in x's dtype.

    Raises:
        TypeError: x or bias is of another dtype than the weight, or the weight's values were cast to a dtype that
            packed weights can't have.
        ValueError: x or bias has the wrong width or is on another device.
    """
    _check(x, weight, bias)
    if not torch.compiler.is_compiling() and x.is_cuda and _nobody_watches(x, bias):
        return _cuda_kernels().linear(x, weight, bias, relu)
    y = torch.ops.flash_llm.linear.default(x, bias, *_flat(weight))
    return y.relu() if relu else y


def unpack(weight: PackedWeight) -> Tensor:
    """The dense [M, K] matrix of a packed weight, through the device's own kernel."""
    return torch.ops.flash_llm.unpack.default(*_flat(weight))


def _nobody_watches(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing but the product would come of calling the operator: no gradients, and no subclass, mode,
    transform or trace that is to see it. Then it is left out: to get through to an operator in Python takes torch 25 to
    65 us on an H100's host, more than all else of a launch."""
    if type(x) is not Tensor or (bias is not None and type(bias) not in (Tensor, torch.nn.Parameter)):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


@functools.cache
def _cuda_kernels() -> ModuleType:
    """Imported where there is a GPU alone."""
    return importlib.import_module("flash_llm.kernels.cuda")


def _flat(weight: PackedWeight) -> tuple[Any, ...]:
    rows, columns = weight.shape
    tensors = (weight.bitmap, weight.values, weight.offsets, weight.scales)
    return (*tensors, rows, columns, weight.tile_words, weight.max_packets, weight.dtype)


def _check(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    rows, columns = weight.shape
    if weight.values.dtype not in (VALUE_DTYPES if weight.scales is None else _QUANTISED):
        what = "float16 or bfloat16 values" if weight.scales is None else "float8_e4m3fn or int8 values with its scales"
        raise TypeError(f"a packed weight holds {what}, not {weight.values.dtype}: cast them back")
    if weight.dtype not in VALUE_DTYPES:
        raise TypeError(f"a packed weight is one of float16 or bfloat16, not {weight.dtype}: use in_dtype")
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype} but the weight is {weight.dtype}; convert x with x.to({weight.dtype})")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x of shape {tuple(x.shape)} doesn't fit a weight of {rows} x {columns}: its last dimension must be "
            f"{columns}"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but the weight is on {weight.device}; move one of them")
    if bias is None:
        return
    if bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype} but x is {x.dtype}; convert it with bias.to({x.dtype})")
    if bias.shape != (rows,):
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} doesn't fit a weight of {rows} x {columns}: it takes ({rows},)"
        )
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device} but x is on {x.device}; move one of them")


_SLOW_CPU = (
    "flash_llm.linear on a CPU expands the weight at every call, since there is no kernel for it; "
    "SparseLinear expands it once and keeps it"
)
_QUANTISED = (torch.float8_e4m3fn, torch.int8)
_WEIGHT = (
    "Tensor bitmap, Tensor values, Tensor offsets, Tensor? scales, int rows, int columns, int tile_words, "
    "int max_packets, ScalarType dtype"
)
torch.library.define("flash_llm::linear", f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
torch.library.define("flash_llm::unpack", f"({_WEIGHT}) -> Tensor")


def _packed(
    bitmap: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    rows: int,
    columns: int,
    tile_words: int,
    max_packets: int,
    dtype: torch.dtype,
) -> PackedWeight:
    computed_in = None if scales is None else dtype
    shape = (rows, columns)
    return PackedWeight(shape, bitmap, values, offsets, tile_words, max_packets, None, scales, computed_in)


@torch.library.impl("flash_llm::linear", "cpu")
def _linear_cpu(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    warnings.warn(_SLOW_CPU, SlowPathWarning, stacklevel=2)
    return reference.linear(x, _packed(*weight), bias)


@torch.library.impl("flash_llm::unpack", "cpu")
def _unpack_cpu(*weight: Any) -> Tensor:
    return reference.unpack(_packed(*weight))


@torch.library.impl("flash_llm::linear", "cuda")
def _linear_cuda(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return _cuda_kernels().linear(x, _packed(*weight), bias)


@torch.library.impl("flash_llm::unpack", "cuda")
def _unpack_cuda(*weight: Any) -> Tensor:
    return _cuda_kernels().unpack(_packed(*weight))


@torch.library.register_fake("flash_llm::linear")
def _linear_fake(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _packed(*weight).shape[0])


@torch.library.register_fake("flash_llm::unpack")
def _unpack_fake(*weight: Any) -> Tensor:
    packed = _packed(*weight)
    return packed.values.new_empty(packed.shape, dtype=packed.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *weight = inputs
    ctx.save_for_backward(*weight[:4])
    ctx.numbers = weight[4:]
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.flash_llm.unpack(*ctx.saved_tensors, *ctx.numbers)
    if ctx.has_bias and ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, grad_bias, *[None] * 9)


torch.library.register_autograd("flash_llm::linear", _backward, setup_context=_setup_context)
