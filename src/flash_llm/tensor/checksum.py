"""A checksum of a tensor's bytes that any device computes at memory speed, with the same result."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22
_MASK = (1 << 64) - 1


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's bytes (not of its shape or dtype).

    The bytes are read as 32-bit words x_i, and sum (2 i + 1) x_i is taken modulo 2**64. The weights are odd, so a
    change of any one word, whatever it is, changes the sum. It guards against damage, not against forgery.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    tail = raw.numel() % 4
    total = raw.numel()  # so that a cut-off tail of zeros shows too
    if tail:
        rest = int.from_bytes(bytes(raw[-tail:].tolist()), "little")
        total += rest * (2 * (raw.numel() // 4) + 1)
        raw = raw[:-tail]
    aligned = raw.data_ptr() % 4 == 0 and raw.storage_offset() % 4 == 0
    words = (raw if aligned else raw.clone()).view(torch.int32)
    sums = [torch.zeros((), dtype=torch.int64, device=raw.device)]
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        weight = torch.arange(2 * start + 1, 2 * (start + part.numel()) + 1, 2, device=raw.device)
        sums.append((part * weight).sum())
    return (total + int(torch.stack(sums).sum())) & _MASK
