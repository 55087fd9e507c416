"""The loss: cross-entropy of the next token, and distillation from a teacher (arXiv 1503.02531)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Logits are turned to float32 this many elements at a time: 64 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 24


def language_loss(
    logits: Tensor, ids: Tensor, teacher: Tensor | None = None, distill: float = 0.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean loss over the predicted tokens: ``(1 - distill) * CE + distill * temperature**2 * KL``.

    CE is the cross-entropy of the next token, KL the divergence of the model's distribution from the teacher's, both
    softened by the temperature. The gradient is computed at once, in chunks of float32, and kept in the logits' dtype:
    beside the logits and their gradient there is never a third tensor of their size.

    Args:
        logits: of the model, ``[B, T, vocabulary]``.
        ids: the tokens, int64 ``[B, T]``; the last T - 1 of each row are predicted.
        teacher: logits of the teacher, as ``logits``; needs no gradient.
        distill: weight of the distillation, 0 to 1; 0 without a teacher.
        temperature: of the distillation.

    Returns:
        The loss, and the cross-entropy without a gradient: float32 scalars on the logits' device.
    """
    vocabulary = logits.shape[-1]
    rows = logits[:, :-1].reshape(-1, vocabulary)
    taught = None if teacher is None else teacher[:, :-1].reshape(-1, vocabulary)
    return _Loss.apply(rows, ids[:, 1:].reshape(-1), taught, distill if teacher is not None else 0.0, temperature)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, targets: Tensor, teacher: Tensor | None, distill: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        total, entropy = logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        size, count = max(1, _CHUNK_ELEMENTS // logits.shape[-1]), len(logits)
        for first in range(0, count, size):
            part = slice(first, first + size)
            scores, target = logits[part].float(), targets[part, None]
            log_p = functional.log_softmax(scores, dim=-1)
            negative = -log_p.gather(1, target).sum()
            entropy += negative
            total += (1 - distill) * negative
            slope = log_p.exp().scatter_add_(1, target, torch.full_like(scores[:, :1], -1.0)) if wanted else None
            if slope is not None:
                slope *= 1 - distill
            if teacher is not None:
                log_s = functional.log_softmax(scores / temperature, dim=-1)
                log_t = functional.log_softmax(teacher[part].float() / temperature, dim=-1)
                p_t = log_t.exp()
                total += distill * temperature**2 * (p_t * (log_t - log_s)).sum()
                if slope is not None:
                    slope.add_(log_s.exp() - p_t, alpha=distill * temperature)
            if gradient is not None and slope is not None:
                gradient[part] = slope / count
        if gradient is not None:
            ctx.save_for_backward(gradient)
        entropy /= count
        ctx.mark_non_differentiable(entropy)
        return total / count, entropy

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None, None
