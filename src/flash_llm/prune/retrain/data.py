"""Training data: windows of a text in an order that the seed and the step alone decide."""

from __future__ import annotations

import torch
from torch import Tensor


def mixed(seed: int, number: int) -> int:
    """A seed of 32 bits, which is all that a generator on the CPU looks at, for the number-th use of a seed."""
    return (seed * 1_000_003 + number) % 2**32


class Batches:
    """Windows of tokens, epoch after epoch, each cut from another offset and in another order.

    Which windows a step sees depends on nothing but the arguments and its number: a run that was cut off needs no
    state of this to go on.

    Args:
        ids: tokens of the text, int64 ``[tokens]``, on the device of the model.
        seqlen: tokens in a window.
        batch: windows in a step.
        validation: windows at the end that are never trained on.
        seed: of offsets and orders.

    Attributes:
        windows: in an epoch.
        validation: the windows held back, int64 ``[validation, seqlen]``.

    Raises:
        ValueError: too little text.
    """

    def __init__(self, ids: Tensor, seqlen: int, batch: int, validation: int, seed: int) -> None:
        kept = ids.numel() - validation * seqlen
        self.windows = (kept - seqlen + 1) // seqlen
        if self.windows < 1:
            raise ValueError(
                f"The text has {ids.numel()} tokens; {validation} windows of {seqlen} to validate with and one to "
                f"train on, from any offset, need {(validation + 2) * seqlen - 1}: give more text or shorter windows."
            )
        self.validation = ids[kept:].view(validation, seqlen)
        self._every = ids[:kept].unfold(0, seqlen, 1)
        self._seqlen, self._batch, self._seed = seqlen, batch, seed
        self._epoch, self._starts = -1, ids[:0]

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, at least 1."""
        return max(1, round(epochs * self.windows / self._batch))

    def __call__(self, step: int) -> Tensor:
        """The windows of a step, counted from 0: int64 ``[batch, seqlen]``."""
        number, end = step * self._batch, (step + 1) * self._batch
        starts = []
        while number < end:  # the windows of all epochs are numbered through
            epoch, index = divmod(number, self.windows)
            starts.append(self._order(epoch)[index : index + end - number])
            number += len(starts[-1])
        return self._every[torch.cat(starts)]

    def _order(self, epoch: int) -> Tensor:
        """Where an epoch's windows begin in the text. It lies on the device: a step doesn't wait for a copy."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed(self._seed, epoch))
            offset = torch.randint(self._seqlen, (), generator=generator)
            starts = offset + self._seqlen * torch.randperm(self.windows, generator=generator)
            self._epoch, self._starts = epoch, starts.to(self._every.device)
        return self._starts
