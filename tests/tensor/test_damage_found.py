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
from flash_llm.tensor.layout import FORMAT_VERSION, TILE_WORDS
from sparse_matrices import any_bits, bits, sparse

NAMES = ("bitmap", "values", "offsets")
WEIGHTS = {
    "partial": PackedWeight.from_dense(sparse(37, 200, 0.6)),  # ends within a strip, a word and a tile
    "whole": PackedWeight.from_dense(sparse(32, 128, 0.5, torch.bfloat16)),
    "zero": PackedWeight.from_dense(torch.zeros(20, 70).half()),
    "dense": PackedWeight.from_dense(any_bits(16, 320, 0.0, torch.float16, 1)),
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
        assert metadata["format_version"] == FORMAT_VERSION
        again = PackedWeight.from_state(weight.tensors(), metadata).validate()
        assert again.metadata() == weight.metadata()
        assert torch.equal(bits(again.to_dense()), bits(weight.to_dense()))
        state = empty_state(metadata, "cpu")
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
            name: (t.shape, t.dtype) for name, t in weight.tensors().items()
        }


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(WEIGHTS)), st.sampled_from(NAMES), st.integers(0, 2**31))
def test_any_flipped_bit_is_found(kind: str, name: str, place: int) -> None:
    weight = WEIGHTS[kind]
    tensor = getattr(weight, name)
    if tensor.numel():
        is_found(replace(weight, **{name: flipped(tensor, place % (8 * tensor.nbytes))}))


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["bitmap", "offsets"]), st.integers(0, 2**31))
def test_what_kernels_trust_is_proven_without_a_checksum(name: str, place: int) -> None:
    """A flipped bit of the bitmap or the offsets is either found, or moves no packet and lies inside of the matrix."""
    weight = replace(WEIGHTS["partial"], checksum=None)
    tensor = getattr(weight, name)
    damaged = replace(weight, **{name: flipped(tensor, place % (8 * tensor.nbytes))})
    try:
        damaged.validate()
    except FormatError:
        return
    assert name == "bitmap"
    assert damaged.to_dense().shape == weight.shape


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["partial", "whole"]), st.data())
def test_swapped_values_are_found(kind: str, data: st.DataObject) -> None:
    weight = WEIGHTS[kind]
    i, j = (data.draw(st.integers(0, weight.values.numel() - 1)) for _ in range(2))
    values = weight.values.clone()
    values[i], values[j] = weight.values[j], weight.values[i]
    if not torch.equal(bits(values), bits(weight.values)):
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
    if unchanged and tensor.numel() == 0:
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
    is_found(replace(weight, max_packets=weight.max_packets + 1))
    is_found(replace(weight, max_packets=weight.max_packets - 1))
    for tile_words in set(TILE_WORDS) - {weight.tile_words}:
        is_found(replace(weight, tile_words=tile_words))


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_a_newer_version_asks_for_an_upgrade(version: int) -> None:
    weight = WEIGHTS["whole"]
    with pytest.raises(FormatError, match=rf"version {version}.*reads version {FORMAT_VERSION}.*upgrade flash-llm"):
        PackedWeight.from_state(weight.tensors(), weight.metadata() | {"format_version": version})


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.5, [1]])
def test_a_version_that_never_was_is_refused(version: Any) -> None:
    weight = WEIGHTS["whole"]
    with pytest.raises(FormatError, match="compress it again"):
        PackedWeight.from_state(weight.tensors(), weight.metadata() | {"format_version": version})


garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ("format_version", "shape", "dtype", "tile_words", "max_packets", "packets", "checksum")


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FIELDS), garbage)
@example("shape", [32, "128"])
@example("shape", [32.5, 128])
@example("shape", [32, 2**70])
@example("dtype", "float32")
@example("dtype", "Tensor")
@example("tile_words", True)
@example("tile_words", 2.5)
@example("max_packets", float("inf"))
@example("packets", 2**40)
@example("checksum", "00")
@example("checksum", "-1")
def test_garbage_in_the_metadata_is_a_format_error(field: str, value: Any) -> None:
    """Or, where it happens to mean the same, it changes nothing."""
    weight = WEIGHTS["whole"]
    metadata = weight.metadata() | {field: value}
    try:
        empty_state(metadata)
        again = PackedWeight.from_state(weight.tensors(), metadata).validate()
    except FormatError:
        return
    assert again.shape == weight.shape
    assert torch.equal(bits(again.to_dense()), bits(weight.to_dense()))


@pytest.mark.parametrize("field", ["format_version", "shape", "tile_words", "max_packets", "checksum"])
def test_missing_metadata_are_a_format_error(field: str) -> None:
    metadata = WEIGHTS["whole"].metadata()
    del metadata[field]
    with pytest.raises(FormatError):
        parse_metadata(metadata)


def test_a_missing_tensor_is_a_format_error() -> None:
    for name in NAMES:
        tensors = WEIGHTS["whole"].tensors()
        del tensors[name]
        with pytest.raises(FormatError, match=rf"lacks its tensors \['{name}'\]"):
            PackedWeight.from_state(tensors, WEIGHTS["whole"].metadata())
