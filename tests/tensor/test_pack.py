"""Packing: dense to packed and back, what the packed tensors hold, and how large they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flash_llm import PackedWeight
from flash_llm.tensor import layout
from flash_llm.tensor import pack as packing
from slow_packing import slow_pack
from sparse_matrices import DTYPES, PATTERNS, any_bits, bits, matrices, sparse, without_negative_zero

TILE_SIZES = st.sampled_from([None, 1, 2]) | st.sampled_from(layout.TILE_WORDS)
relaxed = settings(deadline=None, max_examples=100)


def packed_or_too_dense(dense: Tensor, tile_words: int | None) -> PackedWeight:
    """Packed with that tile size, or with one that is chosen where it is too large."""
    try:
        return PackedWeight.from_dense(dense, tile_words=tile_words)
    except ValueError:
        assert tile_words is not None
        assert tile_words > 2
        return PackedWeight.from_dense(dense)


@relaxed
@given(matrices(), TILE_SIZES)
def test_every_bit_comes_back_and_no_lane_exceeds_its_capacity(dense: Tensor, tile_words: int | None) -> None:
    weight = packed_or_too_dense(dense, tile_words).validate()
    assert weight.shape == tuple(dense.shape)
    assert weight.dtype == dense.dtype
    assert torch.equal(bits(weight.to_dense()), bits(without_negative_zero(dense)))
    assert weight.nnz == int((bits(dense) & 0x7FFF != 0).sum())
    assert 8 * weight.max_packets <= layout.LANE_CAPACITY


@relaxed
@given(matrices(), st.sampled_from(layout.ValueKind))
def test_a_weight_can_be_put_into_one_piece_of_memory(dense: Tensor, kind: layout.ValueKind) -> None:
    weight = PackedWeight.from_dense(dense.nan_to_num(0, 1, -1), values=kind)
    moved = weight.together()
    pieces = {tensor.untyped_storage().data_ptr() for tensor in moved.tensors().values() if tensor.numel()}
    assert len(pieces) == 1
    size = moved.bitmap.untyped_storage().nbytes()
    assert weight.nbytes <= size < weight.nbytes + 256 * len(weight.tensors()), "and nothing else is in it"
    for name, tensor in weight.tensors().items():
        assert torch.equal(moved.tensors()[name].view(torch.uint8), tensor.view(torch.uint8))
        assert not tensor.numel() or tensor.data_ptr() not in pieces
    assert moved.metadata() == weight.metadata()
    moved.validate()


def test_special_values_keep_their_bits() -> None:
    for dtype in DTYPES:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
        back = PackedWeight.from_dense(every).to_dense()
        assert torch.equal(bits(back), bits(without_negative_zero(every)))
        assert not (bits(back) == -0x8000).any()


@settings(deadline=None, max_examples=25)
@given(matrices(max_rows=40, max_columns=400), TILE_SIZES)
def test_the_tensors_are_what_the_layout_says(dense: Tensor, tile_words: int | None) -> None:
    weight = packed_or_too_dense(dense, tile_words)
    bitmap, values, offsets = slow_pack(dense, weight.tile_words)
    assert (weight.bitmap.long() & 0xFFFFFFFF).tolist() == bitmap
    assert bits(weight.values).tolist() == [v if v < 2**15 else v - 2**16 for v in values]
    assert weight.offsets.tolist() == offsets


@pytest.mark.parametrize("kind", layout.ValueKind, ids=lambda kind: kind.value)
def test_every_element_has_one_place(kind: layout.ValueKind) -> None:
    """Lanes and elements cover a word's 16 x 64 elements once each, and the elements a word's bits."""
    places = [layout.element_coordinates(lane, element, kind) for lane in range(32) for element in range(32)]
    assert sorted(places) == [(row, column) for row in range(16) for column in range(64)]
    assert sorted(layout.bit_position(element, kind) for element in range(32)) == list(range(32))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_the_tile_is_chosen_to_fit(sparsity: float, pattern: str) -> None:
    """One dense tile anywhere makes every tile small; a matrix narrower than a tile doesn't get a wider one."""
    weight = PackedWeight.from_dense(sparse(48, 2048, sparsity, pattern=pattern))
    assert weight.tile_words in layout.TILE_WORDS
    assert weight.max_packets * layout.PACKET_VALUES <= layout.LANE_CAPACITY
    if sparsity == 0.0 or pattern == "one tile":
        assert weight.tile_words <= 3  # 32 of 32 elements in a word: 96 in three
    assert PackedWeight.from_dense(torch.zeros(1, 64).half()).tile_words <= 2


def test_large_matrices_get_larger_tiles_than_small_ones() -> None:
    """Where there is work for every multiprocessor anyway, fixed costs count; elsewhere an even share does."""
    small, large = (PackedWeight.from_dense(sparse(rows, 4096, 0.9)) for rows in (1024, 16384))
    assert small.tile_words < large.tile_words


def test_overhead_is_at_most_8_percent() -> None:
    """Over 2 bytes a nonzero and one bit an element."""
    noise = torch.randint(0, 100, (4096, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.5, 0.6, 0.7, 0.8):
        weight = PackedWeight.from_dense((noise >= 100 * sparsity).half())
        assert weight.nbytes <= 1.08 * (2 * weight.nnz + 4096 * 4096 / 8), sparsity
        assert weight.nbytes == sum(tensor.nbytes for tensor in weight.tensors().values())
        assert weight.dense_nbytes == 2 * 4096 * 4096
        assert weight.sparsity == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_strips_join(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is packed in pieces to save memory: pieces of one strip give the same as one piece."""
    dense = any_bits(100, 700, 0.6, dtype, 3)
    whole = PackedWeight.from_dense(dense)
    monkeypatch.setattr(packing, "_CHUNK_ELEMENTS", {"cpu": 1})
    pieces = PackedWeight.from_dense(dense)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(
        whole.tensors().values(), pieces.tensors().values(), strict=True))  # fmt: skip
    assert whole.metadata() == pieces.metadata()
    assert torch.equal(bits(pieces.to_dense()), bits(without_negative_zero(dense)))


def test_views_and_parameters_pack_like_copies() -> None:
    base = sparse(96, 200, 0.6)
    expected = PackedWeight.from_dense(base.T[3:50, 1::2].clone()).metadata()
    assert PackedWeight.from_dense(base.T[3:50, 1::2]).metadata() == expected
    assert PackedWeight.from_dense(nn.Parameter(base.T[3:50, 1::2])).metadata() == expected


@pytest.mark.parametrize(
    ("dense", "error", "words"),
    [
        ([[1.0]], TypeError, "tensor is needed"),
        (torch.ones(4, 4), TypeError, "float32.*convert"),
        (torch.ones(4, 4, dtype=torch.int8), TypeError, "int8"),
        (torch.ones(4, 4, dtype=torch.int16), TypeError, "int16"),
        (torch.ones(4, 4).half().to_sparse(), TypeError, "sparse_coo.*to_dense"),
        (torch.ones(4).half(), ValueError, r"shape \(4,\)"),
        (torch.ones(2, 2, 2).half(), ValueError, r"shape \(2, 2, 2\)"),
        (torch.ones(0, 4).half(), ValueError, r"shape \(0, 4\)"),
        (torch.ones(4, 0).half(), ValueError, r"shape \(4, 0\)"),
        (torch.ones(4, 4, device="meta").half(), ValueError, "meta.*load"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_words(dense: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PackedWeight.from_dense(dense)


@pytest.mark.parametrize("tile_words", [0, -1, 9, 17, 2.5])
def test_unknown_tile_sizes_are_refused(tile_words: int) -> None:
    with pytest.raises(ValueError, match=r"tile_words=.*leave it out"):
        PackedWeight.from_dense(sparse(16, 64, 0.5), tile_words=tile_words)


PEAK = """
import torch
from flash_llm import PackedWeight

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

dense = torch.empty(6144, 7168, dtype=torch.float16)
for rows in dense.split(512):  # piece by piece, so that making it leaves no higher peak behind
    rows.copy_(torch.rand(rows.shape) > 0.7)
PackedWeight.from_dense(dense[:16])
before = kib("VmRSS")
PackedWeight.from_dense(dense)
print(dense.nbytes, before * 1024, kib("VmHWM") * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_packing_takes_less_than_four_times_the_dense_memory(tmp_path: Path) -> None:
    """With the dense matrix itself counted in. In a process of its own, whose peak is known."""
    script = tmp_path / "peak.py"
    script.write_text(PEAK)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=300)
    dense, before, after = map(int, run.stdout.split())
    assert after - before + dense < 4 * dense
