"""The lowest scores among any number of tensors, without putting them into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_llm.prune.method import lowest
from flash_llm.prune.retrain.processes import ALONE, Processes

_LARGEST = 0x7F800000  # infinity


def lowest_of_all(scores: Sequence[Tensor], count: int, processes: Processes = ALONE) -> list[Tensor]:
    """Mark the ``count`` lowest scores of all tensors together. Of equal ones, those that come first.

    Floats that are not negative are ordered like their bits, so that halving an interval of integers finds the
    threshold in 31 passes of counting, which need no memory to speak of. A single tensor on a GPU takes fewer steps,
    and the host waits for none of them. The same bits on every run.

    Args:
        scores: float32, 0 and more; any shapes, one device.
        count: how many, 0 to the number of all elements.
        processes: that each tensor is shared out to, this one's part being given; the lowest are those of all of them.

    Returns:
        A bool tensor for each of ``scores``.
    """
    if len(scores) == 1 and scores[0].is_cuda and processes.size == 1:
        return [lowest(scores[0].reshape(1, -1), count).view_as(scores[0])]
    keys = [score.contiguous().view(torch.int32) for score in scores]
    low, high = 0, _LARGEST
    while low < high:
        middle = (low + high) // 2
        if processes.sum(int(torch.stack([(key <= middle).sum() for key in keys]).sum())) >= count:
            high = middle
        else:
            low = middle + 1
    marked = [key < low for key in keys]
    room = count - processes.sum(sum(int(mark.sum()) for mark in marked))
    for key, mark in zip(keys, marked, strict=True):
        if room <= 0:
            break
        ties = key == low
        mine = room - processes.before(int(ties.sum()))  # parts follow each other in the processes' order
        first = ties & (ties.flatten().cumsum(0) <= mine).view_as(ties)
        mark |= first
        room -= processes.sum(int(first.sum()))
    return marked
