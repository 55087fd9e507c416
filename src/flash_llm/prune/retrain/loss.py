"""The loss: cross-entropy of the next token, and distillation from a teacher (arXiv 1503.02531)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Logits are turned to float32 this many elements at a time: 64 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 24
_NOTHING = -1  # the target of a row's last token


def language_loss(
    logits: Tensor,
    ids: Tensor,
    teacher: Tensor | None = None,
    distill: float = 0.0,
    temperature: float = 1.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean loss over the predicted tokens: ``(1 - distill) * CE + distill * temperature**2 * KL``.

    CE is the cross-entropy of the next token, KL the divergence of the model's distribution from the teacher's, both
    softened by the temperature. The gradient is computed at once and kept in the logits' dtype: beside the logits and
    their gradient there is never a third tensor of their size.

    Args:
        logits: of the model, ``[B, T, vocabulary]``.
        ids: the tokens, int64 ``[B, T]``; the last T - 1 of each row are predicted.
        teacher: logits of the teacher, as ``logits``; needs no gradient.
        distill: weight of the distillation, 0 to 1; 0 without a teacher.
        temperature: of the distillation.
        compiled: use ``torch.compile``, whose kernels read the logits a few times and write the gradient once; else all
            is done in chunks of float32.

    Returns:
        The loss, and the cross-entropy without a gradient: float32 scalars on the logits' device.
    """
    # The last position of each row has a target too, which counts nothing: to slice it off would copy the logits.
    targets = functional.pad(ids[:, 1:], (0, 1), value=_NOTHING).flatten()
    count = ids.shape[0] * (ids.shape[1] - 1)
    if teacher is None:
        distill = 0.0
    else:
        teacher = teacher.flatten(0, 1)
    return _Loss.apply(logits.flatten(0, 1), targets, count, teacher, distill, temperature, compiled)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        count: int,
        teacher: Tensor | None,
        distill: float,
        temperature: float,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        if compiled:
            sums, gradient = _compiled_rows(logits, targets, count, teacher, distill, temperature, wanted)
        else:
            sums, gradient = logits.new_zeros(2, dtype=torch.float32), torch.empty_like(logits) if wanted else None
            size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
            for first in range(0, len(logits), size):
                part = slice(first, first + size)
                taught = None if teacher is None else teacher[part]
                found, slope = _rows(logits[part], targets[part], count, taught, distill, temperature, wanted)
                sums += found
                if gradient is not None and slope is not None:
                    gradient[part] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        loss, entropy = (sums / count).unbind()
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None, None, None


def _rows(
    logits: Tensor,
    targets: Tensor,
    count: int,
    teacher: Tensor | None,
    distill: float,
    temperature: float,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of the loss and the cross-entropy over some positions, and, if wanted, the gradient of the loss's mean."""
    scores, predicted = logits.float(), (targets != _NOTHING)[:, None]
    log_p = functional.log_softmax(scores, dim=-1)
    entropy = -(log_p.gather(1, targets.clamp_min(0)[:, None]) * predicted).sum()
    total, slope = (1 - distill) * entropy, None
    if wanted:
        hit = targets[:, None] == torch.arange(logits.shape[-1], device=logits.device)
        slope = (1 - distill) * (log_p.exp() - hit.float())
    if teacher is not None:
        log_s = log_p if temperature == 1 else functional.log_softmax(scores / temperature, dim=-1)
        log_t = functional.log_softmax(teacher.float() / temperature, dim=-1)
        p_t = log_t.exp()
        divergence = (p_t * (log_t - log_s)).sum(dim=-1, keepdim=True)
        total = total + distill * temperature**2 * (divergence * predicted).sum()
        if slope is not None:
            slope = slope + distill * temperature * (log_s.exp() - p_t)
    gradient = None if slope is None else (slope * (predicted / count)).to(logits.dtype)
    return torch.stack([total, entropy]), gradient


_compiled_rows = torch.compile(_rows, dynamic=False)
