"""Distillation of hidden states: after each block the model is to have what its teacher has there.

As SquareHead (Kurtic et al., arXiv 2310.06927): the squared difference over the square of the teacher's own. But token
by token, since a few tokens of a language model have activations so large that they would drown all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.prune.skeleton import block_names


class HiddenStates:
    """What a model's blocks give out, kept while :meth:`kept` is open.

    Args:
        model: of transformers, with repeated blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._states: list[Tensor] | None = None
        for name in block_names(model):
            model.get_submodule(name).register_forward_hook(self._keep)

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """A list to which each block adds its output, ``[B, T, width]``, as it runs."""
        states: list[Tensor] = []
        self._states = states
        try:
            yield states
        finally:
            # Closed before the backward pass, in which gradient checkpointing may run blocks, and hooks, once more.
            self._states = None

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if self._states is not None:
            self._states.append(output[0] if isinstance(output, tuple) else output)


def hidden_loss(states: Sequence[Tensor], taught: Sequence[Tensor], compiled: bool = False) -> Tensor:
    """Mean over blocks and tokens of ``|h - t|**2 / |t|**2``, h being the model's and t the teacher's state.

    Args:
        states: of the model after each block, ``[B, T, width]``.
        taught: of the teacher, alike; needs no gradient.
        compiled: use ``torch.compile``.

    Returns:
        A float32 scalar.
    """
    error: Callable[[Tensor, Tensor], Tensor] = _compiled_error if compiled else _error
    return torch.stack([error(state, teacher) for state, teacher in zip(states, taught, strict=True)]).mean()


def check_alike(model: nn.Module, teacher: nn.Module, weight: float) -> None:
    """Raises:
    ValueError: the teacher's hidden states can't be compared with the model's, block by block.
    """
    own, other = _shape(model), _shape(teacher)
    if own != other:
        raise ValueError(
            f"distill_hidden={weight:g} compares the states of model and teacher block by block, but the model has "
            f"{own[0]} blocks of width {own[1]} and the teacher {other[0]} of {other[1]}: leave it out, or name the "
            "dense model that was pruned."
        )


def _shape(model: nn.Module) -> tuple[int, int]:
    return len(block_names(model)), model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]


def _error(state: Tensor, teacher: Tensor) -> Tensor:
    teacher = teacher.float()
    size = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((state.float() - teacher).square().sum(-1) / size).mean()


_compiled_error = torch.compile(_error, dynamic=False)
