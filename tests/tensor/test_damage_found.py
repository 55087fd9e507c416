"""validate(): whatever was damaged, a FormatError says so. Metadata that make no sense are refused before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_llm import FormatError, PackedWeight
from flash_llm.tensor import empty_state, parse_metadata
from flash_llm.tensor.layout import FORMAT_VERSION, RETIRED_VERSIONS, TILE_WORDS
from sparse_matrices import any_bits, bits, sparse

NAMES = ("bitmap", "values", "offsets")
WEIGHTS = {
    "partial": PackedWeight.from_dense(sparse(37, 200, 0.6)),  # ends within a strip, a word and a tile
    "whole": PackedWeight.from_dense(sparse(32, 128, 0.5, torch.bfloat16)),
    "zero": PackedWeight.from_dense(torch.zeros(20, 70).half()),
    "dense": PackedWeight.from_dense(any_bits(16, 320, 0.0, torch.float16, 1)),
    "float8": PackedWeight.from_dense(sparse(37, 200, 0.6), values="float8_e4m3"),
    "int8": PackedWeight.from_dense(sparse(32, 128, 0.5, torch.bfloat16), values="int8"),
}


def flipped(tensor: Tensor, bit: int) -> Tensor:
    """A copy with one bit changed, counted from the first byte's lowest."""
    damaged = tensor.clone()
    damaged.view(torch.uint8).view(-1)[bit // 8] ^= 1 << bit % 8
    return damaged


def is_found(weight: PackedWeight) -> None:
    with pytest.raises(FormatError):
        weight.validate()


def test_an_undamaged_weight_passes_and_comes_back_from_its_state() -> None:
    for weight in WEIGHTS.values():
        assert weight.validate() is weight
        metadata = json.loads(json.dumps(weight.metadata()))
        assert metadata["format_version"] == weight.kind.format_version
        again = PackedWeight.from_state(weight.tensors(), metadata).validate()
        assert again.metadata() == weight.metadata()
        assert torch.equal(bits(again.to_dense()), bits(weight.to_dense()))
        state = empty_state(metadata, "cpu")
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
            name: (t.shape, t.dtype) for name, t in weight.tensors().items()
        }


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(WEIGHTS)), st.sampled_from([*NAMES, "scales"]), st.integers(0, 2**31))
def test_any_flipped_bit_is_found(kind: str, name: str, place: int) -> None:
    weight = WEIGHTS[kind]
    tensor = weight.tensors().get(name)
    if tensor is not None and tensor.numel():
        is_found(replace(weight, **{name: flipped(tensor, place % (8 * tensor.nbytes))}))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["partial", "float8"]), st.sampled_from(["bitmap", "offsets"]), st.integers(0, 2**31))
def test_what_kernels_trust_is_proven_without_a_checksum(kind: str, name: str, place: int) -> None:
    """A flipped bit of the bitmap or the offsets is either found, or moves no packet and lies inside of the matrix."""
    weight = replace(WEIGHTS[kind], checksum=None)
    tensor = getattr(weight, name)
    damaged = replace(weight, **{name: flipped(tensor, place % (8 * tensor.nbytes))})
    try:
        damaged.validate()
    except FormatError:
        return
    assert name == "bitmap"
    assert damaged.to_dense().shape == weight.shape


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["partial", "whole", "float8", "int8"]), st.data())
def test_swapped_values_are_found(kind: str, data: st.DataObject) -> None:
    weight = WEIGHTS[kind]
    i, j = (data.draw(st.integers(0, weight.values.numel() - 1)) for _ in range(2))
    values = weight.values.clone()
    values[i], values[j] = weight.values[j].clone(), weight.values[i].clone()
    if not torch.equal(values.view(torch.uint8), weight.values.view(torch.uint8)):
        is_found(replace(weight, values=values))


@pytest.mark.parametrize("kind", sorted(WEIGHTS))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[:-1],
        lambda t: t[:0],
        lambda t: torch.cat([t, t[-1:]]),
        lambda t: t.unsqueeze(0),
        lambda t: t.to(torch.int64),
        lambda t: t.to(torch.float32),
        lambda t: t.view(torch.uint8),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t.to("meta"),
    ],
    ids=["truncated", "empty", "longer", "another-dimension", "int64", "float32", "bytes", "strided", "meta"],
)
def test_wrong_shapes_dtypes_and_devices_are_found(kind: str, name: str, damage: Callable[[Tensor], Tensor]) -> None:
    weight = WEIGHTS[kind]
    tensor = getattr(weight, name)
    damaged = damage(tensor)
    unchanged = (damaged.shape, damaged.dtype, damaged.device) == (tensor.shape, tensor.dtype, tensor.device)
    if unchanged and (tensor.numel() == 0 or damaged.is_contiguous()):
        return  # there is nothing to truncate in the values of a matrix of zeros
    is_found(replace(weight, **{name: damaged}))


def test_values_of_whole_packets_too_few_or_too_many_are_found() -> None:
    for weight in (WEIGHTS["partial"], replace(WEIGHTS["partial"], checksum=None)):
        is_found(replace(weight, values=weight.values[:-8]))
        is_found(replace(weight, values=torch.cat([weight.values, weight.values[:8]])))


@pytest.mark.parametrize(
    "shape", [(36, 200), (38, 200), (48, 200), (37, 199), (37, 201), (37, 256), (49, 200), (37, 4)]
)
def test_another_shape_is_found(shape: tuple[int, int]) -> None:
    """Also one that takes the same strips and words."""
    is_found(replace(WEIGHTS["partial"], shape=shape))


def test_another_reading_of_the_same_bits_is_found() -> None:
    weight = WEIGHTS["partial"]
    is_found(replace(weight, values=weight.values.view(torch.bfloat16)))
    is_found(replace(weight, values=weight.values.view(torch.int8)))
    is_found(replace(weight, max_packets=weight.max_packets + 1))
    is_found(replace(weight, max_packets=weight.max_packets - 1))
    for tile_words in set(TILE_WORDS) - {weight.tile_words}:
        is_found(replace(weight, tile_words=tile_words))


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_a_newer_version_asks_for_an_upgrade(version: int) -> None:
    weight = WEIGHTS["whole"]
    with pytest.raises(FormatError, match=rf"version {version}.*reads versions 1 and {FORMAT_VERSION}.*upgrade"):
        PackedWeight.from_state(weight.tensors(), weight.metadata() | {"format_version": version})


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.5, [1], *RETIRED_VERSIONS])
def test_a_version_that_never_was_is_refused(version: Any) -> None:
    weight = WEIGHTS["whole"]
    with pytest.raises(FormatError, match="compress it again"):
        PackedWeight.from_state(weight.tensors(), weight.metadata() | {"format_version": version})


garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("format_version", "shape", "dtype", "values", "tile_words", "max_packets", "packets", "checksum")


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["whole", "int8"]), st.sampled_from(FIELDS), garbage)
@example("whole", "shape", [32, "128"])
@example("whole", "shape", [32.5, 128])
@example("whole", "shape", [32, 2**70])
@example("whole", "dtype", "float32")
@example("whole", "dtype", "Tensor")
@example("int8", "dtype", "int8")
@example("int8", "dtype", "float16")
@example("int8", "values", "float8_e4m3")
@example("int8", "values", "16-bit")
@example("int8", "values", ["int8"])
@example("int8", "format_version", 1)
@example("whole", "format_version", 3)
@example("whole", "tile_words", True)
@example("whole", "tile_words", 2.5)
@example("whole", "max_packets", float("inf"))
@example("whole", "packets", 2**40)
@example("whole", "checksum", "00")
@example("whole", "checksum", "-1")
def test_garbage_in_the_metadata_is_a_format_error(kind: str, field: str, value: Any) -> None:
    """Or, where it happens to mean the same, it changes nothing."""
    weight = WEIGHTS[kind]
    metadata = weight.metadata() | {field: value}
    try:
        empty_state(metadata)
        again = PackedWeight.from_state(weight.tensors(), metadata).validate()
    except FormatError:
        return
    assert again.shape == weight.shape
    assert torch.equal(bits(again.to_dense()), bits(weight.to_dense()))


@pytest.mark.parametrize(
    "field", ["format_version", "shape", "dtype", "values", "tile_words", "max_packets", "checksum"]
)
def test_missing_metadata_are_a_format_error(field: str) -> None:
    metadata = WEIGHTS["int8"].metadata()
    del metadata[field]
    with pytest.raises(FormatError):
        parse_metadata(metadata)


def test_a_missing_tensor_is_a_format_error() -> None:
    for name in (*NAMES, "scales"):
        tensors = WEIGHTS["int8"].tensors()
        del tensors[name]
        with pytest.raises(FormatError, match=rf"lacks its tensors \['{name}'\]"):
            PackedWeight.from_state(tensors, WEIGHTS["int8"].metadata())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_scales_that_are_no_positive_numbers_are_found_without_a_checksum(kind: str, scale: float) -> None:
    weight = replace(WEIGHTS[kind], checksum=None)
    assert weight.scales is not None
    scales = weight.scales.clone()
    scales[3] = scale
    with pytest.raises(FormatError, match=r"scales\[3\] is .*above 0"):
        replace(weight, scales=scales).validate()


@pytest.mark.parametrize(
    "damage", [None, torch.ones(36), torch.ones(37).double(), torch.ones(37, 1), torch.ones(74)[::2]]
)
def test_scales_of_another_shape_or_dtype_are_found(damage: Tensor | None) -> None:
    is_found(replace(WEIGHTS["float8"], checksum=None, scales=damage))
    is_found(replace(WEIGHTS["partial"], checksum=None, scales=torch.ones(37)))


@pytest.mark.parametrize(("kind", "byte"), [("float8", 0x7F), ("float8", 0xFF), ("int8", 0x80)])
def test_bytes_that_are_no_number_are_found_without_a_checksum(kind: str, byte: int) -> None:
    weight = WEIGHTS[kind]
    values = weight.values.clone()
    values.view(torch.uint8)[5] = byte
    with pytest.raises(FormatError, match=f"{byte:#04x}, which is no number"):
        replace(weight, values=values, checksum=None).validate()
