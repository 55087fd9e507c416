"""The lowest scores among any number of tensors, without putting them into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_llm.prune.method import lowest

_LARGEST = 0x7F800000  # infinity


def lowest_of_all(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the ``count`` lowest scores of all tensors together. Of equal ones, those that come first.

    Floats that are not negative are ordered like their bits, so that halving an interval of integers finds the
    threshold in 31 passes of counting, which need no memory to speak of. A single tensor on a GPU takes fewer steps,
    and the host waits for none of them. The same bits on every run.

    Args:
        scores: float32, 0 and more; any shapes, one device.
        count: how many, 0 to the number of all elements.

    Returns:
        A bool tensor for each of ``scores``.
    """
    if len(scores) == 1 and scores[0].is_cuda:
        return [lowest(scores[0].reshape(1, -1), count).view_as(scores[0])]
    keys = [score.contiguous().view(torch.int32) for score in scores]
    low, high = 0, _LARGEST
    while low < high:
        middle = (low + high) // 2
        if int(torch.stack([(key <= middle).sum() for key in keys]).sum()) >= count:
            high = middle
        else:
            low = middle + 1
    marked = [key < low for key in keys]
    room = count - sum(int(mark.sum()) for mark in marked)
    for key, mark in zip(keys, marked, strict=True):
        if room <= 0:
            break
        ties = key == low
        first = ties & (ties.flatten().cumsum(0) <= room).view_as(ties)
        mark |= first
        room -= int(first.sum())
    return marked
