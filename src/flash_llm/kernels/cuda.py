"""The operators on a GPU: choose a kernel, get its workspace, launch it."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_llm.kernels import ahead, choice, counters, launch, plan, tuned
from flash_llm.tensor import PackedWeight
from flash_llm.tensor.layout import LANES, STRIP_ROWS, WORD_COLUMNS, ValueKind, ceil_div, grid


class _UnpackParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bitmap", "packets", "offsets", "scales", "dense")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "words", "tiles", "total_tiles", "column_bytes")),
    )


class _SpmmParams(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("bitmap", "packets", "offsets", "x", "bias", "scales", "x_scales", "y", "partial", "arrivals")
        ),
        ("x_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rows", "columns", "n", "strips", "words", "tiles", "row_blocks")),
        *((name, ctypes.c_int) for name in ("share", "larger", "late", "units", "whole", "column_bytes")),
        ("least", ctypes.c_float),
    )


class _PlainArgument(ctypes.Structure):
    _fields_ = (("spmm", _SpmmParams),)


_MAP_ALIGN = 64  # of what has a copy engine's description in it: its size is a multiple, too


class _HopperArgument(ctypes.Structure):
    """All of the argument, its end included: the driver copies as many bytes as the kernel's own argument has."""

    _fields_ = (
        ("x", ctypes.c_uint64 * 16),
        ("spmm", _SpmmParams),
        ("end", ctypes.c_char * (-ctypes.sizeof(_SpmmParams) % _MAP_ALIGN)),
    )


class _SplitParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "split", "scales")),
        ("x_stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("n", "columns", "pitch", "tiles", "scale_pitch")),
    )


@functools.cache
def device_properties(device: int) -> plan.Device:
    """What a plan needs to know of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    shared = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return plan.Device((properties.major, properties.minor), properties.multi_processor_count, shared)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, relu: bool = False) -> Tensor:
    """x [..., K] times the transposed weight, plus bias: [..., M]; with ``relu`` what is negative becomes 0.

    Where no CUDA graph is replayed, a model's layers of a few rows of x are over sooner than Python asks for them. So
    what is the same at every call is kept (:class:`_Launch`).
    """
    rows, columns = weight.shape
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    n = flat.shape[0]
    if n >= unpacks_from(x.get_device()):
        y = _linear_unpacked(x, flat, weight, bias)
        return y.relu_() if relu else y
    y = x.new_empty(n, rows)
    flat = _readable(flat)
    bias = None if bias is None else bias.contiguous()
    a_pass = plan.rows_in_a_pass(n, columns)
    if n > a_pass:
        for some, result in zip(flat.split(a_pass), y.split(a_pass), strict=True):
            _spmm(some, weight, bias, result, _launch_of(weight, some.shape[0]), relu)
    elif n:
        _spmm(flat, weight, bias, y, _launch_of(weight, n), relu)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def _linear_unpacked(x: Tensor, flat: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """:func:`linear` for many rows of x: torch multiplies, by as much of the weight at a time as a workspace holds."""
    rows, columns = weight.shape
    a_part = plan.rows_unpacked(rows, columns)
    if a_part >= rows:
        return torch.nn.functional.linear(x, unpack(weight), bias)
    y = x.new_empty(flat.shape[0], rows)
    for start in range(0, rows, a_part):
        stop = min(start + a_part, rows)
        _multiply_rows(flat, weight, bias, y, start, stop)
    return y.view(*x.shape[:-1], rows)


def _multiply_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, start: int, stop: int) -> None:
    """y[:, start:stop] of x [n, K] W^T + bias. What the rows are expanded to is free again when it returns."""
    expanded, result = unpack(weight, start, stop).t(), y[:, start:stop]
    if bias is None:
        torch.mm(x, expanded, out=result)
    else:
        torch.addmm(bias[start:stop], x, expanded, out=result)


def unpack(weight: PackedWeight, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``start``, a multiple of 16, to ``stop`` - 1 of the dense [M, K] matrix; all of them unless told."""
    stop = weight.shape[0] if stop is None else stop
    rows, columns = stop - start, weight.shape[1]
    device = weight.device.index
    dense = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    strips, words, tiles = grid(rows, columns, weight.tile_words)
    chosen = _unpack_plan(weight)
    numbers = (rows, columns, words, tiles, strips * tiles, chosen.column_bytes)
    params = _UnpackParams(*_pointers(weight), _scales(weight), dense.data_ptr(), *numbers)
    before = start // STRIP_ROWS  # strips
    params.bitmap += before * words * LANES * weight.bitmap.itemsize
    params.offsets += before * tiles * weight.offsets.itemsize
    if weight.scales is not None:
        params.scales += start * weight.scales.itemsize
    kernel = launch.get("unpack.cu", "unpack", chosen.defines, launch.architecture(device))
    kernel.launch(params, chosen.blocks, chosen.threads, chosen.shared, device)
    return dense


def multiply(x: Tensor, weight: PackedWeight, chosen: plan.SpmmPlan) -> Tensor:
    """x [n, K] W^T: [n, M], in one launch with a plan that was made for them: to measure plans."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    _spmm(_readable(x), weight, None, y, _prepare(weight, x.shape[0], chosen))
    return y


@dataclass(frozen=True)
class _Launch:
    """A launch of the sparse kernel for a weight and a number of rows of x, but for what changes from call to call."""

    chosen: plan.SpmmPlan
    kernel: launch.Kernel
    argument: ctypes.Structure
    """the kernel's, to be copied; x, bias, y and what else belongs to one call are missing"""
    rows_at_once: int
    """of X, as the copy engine brings it on Hopper; 0 elsewhere"""


_MOST_LAUNCHES = 1 << 14  # that are kept, some 2 KB each
_launches: dict[tuple[object, ...], _Launch] = {}


def _launch_of(weight: PackedWeight, n: int) -> _Launch:
    """How a weight is multiplied by n rows of x. What is kept holds addresses, and is found by them and by all else it
    depends on; so it is right, too, for another weight that has come to lie in the same place."""
    values = weight.values
    key = (
        *_pointers(weight),
        _scales(weight),
        *(weight.shape, values.numel(), values.dtype, weight.computed_in, weight.tile_words, weight.max_packets),
        *(n, values.get_device(), choice.kernel()),
    )
    found = _launches.get(key)
    if found is None:
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        found = _launches[key] = _prepare(weight, n, plan_for(weight, n))
    return found


def _prepare(weight: PackedWeight, n: int, chosen: plan.SpmmPlan) -> _Launch:
    rows, columns = weight.shape
    strips, words, tiles = grid(rows, columns, weight.tile_words)
    params = _SpmmParams()
    params.bitmap, params.packets, params.offsets = _pointers(weight)
    params.scales = _scales(weight)
    params.rows, params.columns, params.n = rows, columns, n
    params.strips, params.words, params.tiles, params.row_blocks = strips, words, tiles, chosen.row_blocks
    params.share, params.larger, params.late = chosen.share, chosen.larger, chosen.late
    params.units, params.whole = chosen.units, chosen.whole
    params.column_bytes = chosen.column_bytes
    kernel = launch.get(chosen.source, "spmm", chosen.defines, launch.architecture(weight.device.index))
    defines = dict(chosen.defines)
    if chosen.source != "spmm_sm90.cu":
        return _Launch(chosen, kernel, _PlainArgument(params), 0)
    rows_at_once = defines["N_BLOCKS"] * 8 * (1 + defines["X8"])
    return _Launch(chosen, kernel, _HopperArgument(spmm=params), rows_at_once)


def _spmm(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, prepared: _Launch, relu: bool = False
) -> None:
    """y [n, M] = x [n, K] W^T + bias, or 0 where that is less and ``relu`` is asked for."""
    chosen, device = prepared.chosen, x.get_device()
    split = x
    argument = type(prepared.argument).from_buffer_copy(prepared.argument)
    params = argument.spmm
    if chosen.splits_x:
        split, x_scales = _split(x, weight, prepared.rows_at_once // 2)
        params.x_scales = x_scales.data_ptr()
    if prepared.rows_at_once:
        argument.x = _x_map(split, prepared.rows_at_once)
    partial = torch.empty(chosen.partial_floats, dtype=torch.float32, device=x.device)
    params.x, params.x_stride = x.data_ptr(), x.stride(0)
    params.y, params.partial = y.data_ptr(), partial.data_ptr()
    params.arrivals = counters.arrivals(device, chosen.counters)
    if bias is not None:
        params.bias = bias.data_ptr()
    params.least = 0.0 if relu else -math.inf
    prepared.kernel.launch(argument, chosen.blocks, chosen.threads, chosen.shared, device, overlap=True)


def _split(x: Tensor, weight: PackedWeight, rows_at_once: int) -> tuple[Tensor, Tensor]:
    """x [n, K] in two parts of 8 bits, as ``csrc/split_x.cu`` makes them, and what sums are to be multiplied by."""
    n, columns = x.shape
    _, words, tiles = grid(*weight.shape, weight.tile_words)
    pitch, scale_pitch = words * WORD_COLUMNS, ceil_div(n, rows_at_once) * rows_at_once
    split = torch.empty(ceil_div(n, 8) * 16, pitch, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tiles, scale_pitch, dtype=torch.float32, device=x.device)
    device = weight.device.index
    numbers = (n, columns, pitch, tiles, scale_pitch)
    params = _SplitParams(x.data_ptr(), split.data_ptr(), scales.data_ptr(), x.stride(0), *numbers)
    chosen = _split_plan(weight, n)
    kernel = launch.get("split_x.cu", "split_x", chosen.defines, launch.architecture(device))
    kernel.launch(params, chosen.blocks, chosen.threads, 0, device, overlap=True)
    return split, scales


_MAP_KINDS = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.uint8: "UINT8"}


def _x_map(x: Tensor, box_rows: int) -> ctypes.Array[ctypes.c_uint64]:
    """The copy engine's description of x [n, K]: boxes of ``box_rows`` rows and 64 columns, zeros outside of x."""
    return _map_of(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), x.dtype, box_rows)


@functools.lru_cache(maxsize=4096)
def _map_of(
    address: int, rows: int, columns: int, stride: int, dtype: torch.dtype, box_rows: int
) -> ctypes.Array[ctypes.c_uint64]:
    """:func:`_x_map` of what lies at an address. Torch gives the same ones again and again, step after step."""
    cu = launch.driver()
    pitch = max(stride, -(-columns // 8) * 8) * dtype.itemsize
    swizzle = f"CU_TENSOR_MAP_SWIZZLE_{WORD_COLUMNS * dtype.itemsize}B"
    status, tensor_map = cu.cuTensorMapEncodeTiled(
        getattr(cu.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_MAP_KINDS[dtype]}"),
        2,
        address,
        [cu.cuuint64_t(columns), cu.cuuint64_t(rows)],
        [cu.cuuint64_t(pitch)],
        [cu.cuuint32_t(WORD_COLUMNS), cu.cuuint32_t(box_rows)],
        [cu.cuuint32_t(1), cu.cuuint32_t(1)],
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(cu.CUtensorMapSwizzle, swizzle),
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    launch.check(status, f"describing x of shape {(rows, columns)}, its rows {stride} elements apart")
    return (ctypes.c_uint64 * 16).from_buffer_copy(ctypes.string_at(tensor_map.getPtr(), 128))


def configurations(weight: PackedWeight, n: int) -> list[ahead.Configuration]:
    """Source, defines and architecture of the kernels that a weight on a GPU takes for n rows of x, at least 1.

    The one that does most of the work comes first.
    """
    arch = launch.architecture(weight.device.index)
    if n >= unpacks_from(weight.device.index):
        return [("unpack.cu", _unpack_plan(weight).defines, arch)]
    a_pass = plan.rows_in_a_pass(n, weight.shape[1])
    last = n % a_pass or a_pass
    found = []
    for part in (a_pass, last):
        chosen = plan_for(weight, part)
        found.append((chosen.source, chosen.defines, arch))
        if chosen.splits_x:
            found.append(("split_x.cu", _split_plan(weight, part).defines, arch))
    return list(dict.fromkeys(found))


def _unpack_plan(weight: PackedWeight) -> plan.UnpackPlan:
    sizes = (*weight.shape, weight.max_packets, weight.tile_words)
    return plan.unpack_plan(device_properties(weight.device.index), *sizes, bool(_is_bf16(weight)), weight.kind)


def _split_plan(weight: PackedWeight, n: int) -> plan.SplitPlan:
    tiles = grid(*weight.shape, weight.tile_words)[2]
    return plan.split_plan(n, tiles, weight.tile_words, bool(_is_bf16(weight)), weight.kind)


def unpacks_from(device: int) -> int:
    """From as many rows of x on a weight on a CUDA device is expanded, with the kernel that is in use."""
    return _unpacks_from(device, choice.kernel())


@functools.cache
def _unpacks_from(device: int, kernel: str) -> int:
    return plan.unpack_from(choice.seen_as(device_properties(device), kernel))


def plan_for(weight: PackedWeight, n: int) -> plan.SpmmPlan:
    """How one launch of the kernel that is in use multiplies a weight on a GPU by n rows of x, at least 1."""
    packets, bf16 = weight.values.numel() // weight.kind.packet_values, bool(_is_bf16(weight))
    numbers = (packets, weight.max_packets, weight.tile_words)
    return spmm_plan_cached(weight.device.index, *weight.shape, *numbers, n, bf16, choice.kernel(), weight.kind)


@functools.lru_cache(maxsize=4096)
def spmm_plan_cached(
    device: int,
    rows: int,
    columns: int,
    packets: int,
    max_packets: int,
    tile_words: int,
    n: int,
    bf16: bool,
    kernel: str = choice.AUTO,
    values: ValueKind = ValueKind.BITS16,
) -> plan.SpmmPlan:
    """The plan for a CUDA device, by its number, and one of ``choice.KERNELS``: as tuned, if it was.

    ``flash-llm tune`` measures 16-bit values alone, so that weights of 8 bits have the usual plan.
    """
    seen = choice.seen_as(device_properties(device), kernel)
    weight = (rows, columns, packets, max_packets, tile_words)
    if values is not ValueKind.BITS16:
        return plan.spmm_plan(seen, *weight, n, bf16, values=values)
    return tuned.spmm_plan(tuned.table(device, kernel), seen, weight, n, bf16)


def forget_plans() -> None:
    """Makes plans anew, after what they depend on has changed."""
    for cache in (device_properties, _unpacks_from, spmm_plan_cached):
        cache.cache_clear()
    _launches.clear()


def _readable(x: Tensor) -> Tensor:
    """x [n, K], or a copy of it that the kernel can read in aligned pieces of 8 elements within a row."""
    n, columns = x.shape
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and columns % 8 == 0
    apart = n == 1 or x.stride(0) >= columns  # rows may overlap or repeat, as expand makes them
    if n == 0 or (aligned and apart):
        return x
    return torch.nn.functional.pad(x, (0, -columns % 8)) if columns % 8 else x.contiguous().clone()


def _pointers(weight: PackedWeight) -> tuple[int, int, int]:
    return weight.bitmap.data_ptr(), weight.values.data_ptr(), weight.offsets.data_ptr()


def _scales(weight: PackedWeight) -> int | None:
    return None if weight.scales is None else weight.scales.data_ptr()


def _is_bf16(weight: PackedWeight) -> int:
    return int(weight.dtype == torch.bfloat16)
