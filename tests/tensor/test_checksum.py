"""The checksum: of bytes alone, and none of them may change unseen."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_llm.tensor import checksum as checksum_of
from sparse_matrices import sparse


def slow_checksum(data: bytes) -> int:
    """docs/format.md, word by word."""
    total = len(data)
    padded = data + bytes(-len(data) % 4)
    for i in range(0, len(padded), 4):
        word = int.from_bytes(padded[i : i + 4], "little", signed=i + 4 <= len(data))
        total += (2 * (i // 4) + 1) * word
    return total % 2**64


def of_bytes(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_it_is_what_the_format_says(data: bytes) -> None:
    assert checksum_of(of_bytes(data)) == slow_checksum(data)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=100), st.data())
def test_any_changed_word_changes_it(data: bytes, choice: st.DataObject) -> None:
    start = choice.draw(st.integers(0, (len(data) - 1) // 4)) * 4
    size = min(4, len(data) - start)
    word = choice.draw(st.binary(min_size=size, max_size=size))
    changed = data[:start] + word + data[start + size :]
    assert (checksum_of(of_bytes(data)) == checksum_of(of_bytes(changed))) == (data == changed)


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(1, 20))
def test_a_cut_off_tail_of_zeros_changes_it(data: bytes, zeros: int) -> None:
    assert checksum_of(of_bytes(data)) != checksum_of(of_bytes(data + bytes(zeros)))


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=64), st.integers(0, 9))
def test_it_is_the_same_wherever_the_bytes_lie(data: bytes, shift: int) -> None:
    """At any address and at any place in a larger storage."""
    expected = checksum_of(of_bytes(data))
    assert checksum_of(of_bytes(bytes(shift) + data)[shift:]) == expected
    memory = bytearray(bytes(shift) + data)
    assert checksum_of(torch.frombuffer(memory, dtype=torch.uint8, offset=shift)) == expected
    whole = torch.frombuffer(bytearray(bytes(9) + data), dtype=torch.uint8, offset=9 - shift)
    assert checksum_of(whole[shift:]) == expected


def test_views_and_shapes_do_not_matter() -> None:
    tensor = sparse(33, 50, 0.5)
    expected = checksum_of(tensor)
    assert checksum_of(tensor.view(50, 33)) == checksum_of(tensor.view(torch.uint8)) == expected
    assert checksum_of(tensor.T) == checksum_of(tensor.T.contiguous())
    assert checksum_of(tensor.T) != expected
