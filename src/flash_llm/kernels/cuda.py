"""The operators on a GPU: choose a kernel, get its workspace, launch it."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from flash_llm.kernels import ahead, choice, counters, launch, plan, tuned
from flash_llm.tensor import PackedWeight
from flash_llm.tensor.layout import WORD_COLUMNS, ValueKind, ceil_div, grid


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
        *((name, ctypes.c_int) for name in ("share", "larger", "late", "column_bytes")),
    )


class _HopperParams(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint64 * 16), ("spmm", _SpmmParams))


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


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed weight, plus bias: [..., M]."""
    rows, columns = weight.shape
    flat = x.reshape(-1, columns)
    if flat.shape[0] >= plan.unpack_from(seen(weight.device.index)):
        return torch.nn.functional.linear(x, unpack(weight), bias)
    y = x.new_empty(flat.shape[0], rows)
    flat = _readable(flat)
    bias = None if bias is None else bias.contiguous()
    a_pass = plan.rows_in_a_pass(flat.shape[0], columns)
    if flat.shape[0] > a_pass:
        for some, result in zip(flat.split(a_pass), y.split(a_pass), strict=True):
            _spmm(some, weight, bias, result)
    elif flat.shape[0]:
        _spmm(flat, weight, bias, y)
    return y.view(*x.shape[:-1], rows)


def unpack(weight: PackedWeight) -> Tensor:
    """The dense [M, K] matrix."""
    rows, columns = weight.shape
    device = weight.device.index
    dense = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    strips, words, tiles = grid(rows, columns, weight.tile_words)
    chosen = _unpack_plan(weight)
    numbers = (rows, columns, words, tiles, strips * tiles, chosen.column_bytes)
    params = _UnpackParams(*_pointers(weight), _scales(weight), dense.data_ptr(), *numbers)
    kernel = launch.get("unpack.cu", "unpack", chosen.defines, launch.architecture(device))
    kernel.launch(params, chosen.blocks, chosen.threads, chosen.shared, device)
    return dense


def multiply(x: Tensor, weight: PackedWeight, chosen: plan.SpmmPlan) -> Tensor:
    """x [n, K] W^T: [n, M], in one launch with a plan that was made for them: to measure plans."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    _spmm(_readable(x), weight, None, y, chosen)
    return y


def _spmm(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, chosen: plan.SpmmPlan | None = None) -> None:
    """y [n, M] = x [n, K] W^T + bias."""
    rows, columns = weight.shape
    device = weight.device.index
    strips, words, tiles = grid(rows, columns, weight.tile_words)
    chosen = chosen or plan_for(weight, x.shape[0])
    defines = dict(chosen.defines)
    split, x_scales = _split(x, weight, defines["N_BLOCKS"] * 8) if chosen.splits_x else (x, None)
    partial = torch.empty(chosen.partial_floats, dtype=torch.float32, device=x.device)
    params = _SpmmParams(
        *_pointers(weight),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        _scales(weight),
        None if x_scales is None else x_scales.data_ptr(),
        y.data_ptr(),
        partial.data_ptr(),
        counters.arrivals(device, chosen.counters),
        x.stride(0),
        *(rows, columns, x.shape[0], strips, words, tiles),
        *(chosen.row_blocks, chosen.share, chosen.larger, chosen.late, chosen.column_bytes),
    )
    kernel = launch.get(chosen.source, "spmm", chosen.defines, launch.architecture(device))
    argument: ctypes.Structure = params
    if chosen.source == "spmm_sm90.cu":
        argument = _HopperParams(_x_map(split, defines["N_BLOCKS"] * 8 * (1 + defines["X8"])), params)
    kernel.launch(argument, chosen.blocks, chosen.threads, chosen.shared, device, overlap=True)


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
    if n >= plan.unpack_from(seen(weight.device.index)):
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


def seen(device: int) -> plan.Device:
    """What plans take a CUDA device for, with the kernel that is in use."""
    return choice.seen_as(device_properties(device), choice.kernel())


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
