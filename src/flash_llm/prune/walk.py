"""The walk of calibration data through a decoder, block by block.

Hidden states stay on the CPU, unless they are a small part of what the device has free; one window and one block at a
time are on the device. What a block is called with besides
the hidden states (mask, rotary embeddings, ...) is recorded from the model's own forward pass, so that any decoder can
be walked whose blocks are called one after another and only hand on hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.errors import CheckpointError
from flash_llm.prune.skeleton import Skeleton

# A sixteenth: 5 GB of 80 GB, beside the four matrices of 20 to 40 GB that the largest layers need.
_SHARE_OF_FREE = 1 / 16


class _Stop(Exception):
    """Ends a forward pass once all that is wanted of it is known."""


class _Mismatch(Exception):
    """A block was given other hidden states than the block before handed on."""


class _Beside:
    """Stands for what a block returns beside the hidden states. A model may drop it, not pass it on."""


_Hand = Callable[[Tensor], Any]

# What a block may hand to its model: which of them the model's forward pass takes, is tried out, as none says it.
_HANDS: tuple[_Hand, ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, _Beside()),
)


@dataclass(frozen=True)
class BlockCall:
    """How the model calls a block, besides the hidden states, which come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run ``block`` on ``hidden [1, tokens, width]``."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output


class Walk:
    """Hidden states on their way through the blocks of a model.

    Args:
        skeleton: the model.
        windows: token ids, int64 ``[samples, tokens]``.
        hidden: inputs of the block at which to go on, ``[samples, tokens, width]``; by default those of the first.

    Attributes:
        hidden: inputs of the next block, in the skeleton's dtype.

    Raises:
        CheckpointError: the model's blocks can't be walked.
    """

    def __init__(self, skeleton: Skeleton, windows: Tensor, hidden: Tensor | None = None) -> None:
        self._skeleton, self._windows = skeleton, windows
        self._hand = _HANDS[0]
        blocks = tuple(name + "." for name in skeleton.block_names)
        parameters = skeleton.model.named_parameters(remove_duplicate=False)
        if any(skeleton.is_shared(name) for name, _ in parameters if name.startswith(blocks)):
            raise self._unsupported("shares weights between its blocks")
        outside = _outside(skeleton, blocks)
        with skeleton.loaded("", wanted=outside), torch.no_grad():
            self._calls = self._record()
            self.hidden = self._placed(self._embed() if hidden is None else hidden)

    def outputs(self, index: int) -> Iterator[Tensor]:
        """What block ``index`` makes of each window, ``[1, tokens, width]``; the hidden states stay as they are."""
        block, call = self._skeleton.block(index), self._calls[index]
        for hidden in self.hidden:
            with torch.no_grad():
                output = call(block, hidden[None].to(self._skeleton.device))
            yield output

    def observe(self, index: int) -> None:
        """Run block ``index`` and drop what it returns: for the hooks on its layers."""
        for _ in self.outputs(index):
            pass

    def advance(self, index: int) -> None:
        """Replace the hidden states by what block ``index`` makes of them."""
        block, call = self._skeleton.block(index), self._calls[index]
        with torch.no_grad():
            for hidden in self.hidden:
                hidden.copy_(call(block, hidden[None].to(self._skeleton.device))[0])

    def observe_head(self, head: nn.Module) -> None:
        """Run what follows the last block up to ``head``: for the hooks on it."""

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Stop

        feed: list[Tensor] = []
        blocks = [self._skeleton.block(index) for index in range(len(self._calls))]

        def skip(*args: Any, **kwargs: Any) -> Any:
            return self._hand(feed[0])

        outside = _outside(self._skeleton, tuple(name + "." for name in self._skeleton.block_names))
        with (
            self._skeleton.loaded("", wanted=outside),
            torch.no_grad(),
            _Replaced([*blocks, head], [skip] * len(blocks) + [stop]),
        ):
            for window, hidden in zip(self._windows, self.hidden, strict=True):
                feed[:] = [hidden[None].to(self._skeleton.device)]
                self._forward(window)

    def _placed(self, hidden: Tensor) -> Tensor:
        """The hidden states on the device, if there is plenty of room for them."""
        device = self._skeleton.device
        if device.type != "cuda" or hidden.nbytes > _SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]:
            return hidden
        return hidden.to(device)

    def _forward(self, window: Tensor) -> None:
        try:
            self._skeleton.model(input_ids=window[None].to(self._skeleton.device), use_cache=False)
        except _Stop:
            return
        raise self._unsupported("does not run all of its blocks in order")

    def _embed(self) -> Tensor:
        """Inputs of the first block for all windows."""
        states: list[Tensor] = []
        hidden: Tensor | None = None

        def catch(*args: Any, **kwargs: Any) -> None:
            states.append(_split_call(args, kwargs)[0])
            raise _Stop

        with _Replaced([self._skeleton.block(0)], [catch]):
            for index, window in enumerate(self._windows):
                self._forward(window)
                state = states.pop()[0]
                if hidden is None:
                    hidden = torch.empty((len(self._windows), *state.shape), dtype=state.dtype)
                hidden[index].copy_(state)
        assert hidden is not None  # CalibrationConfig has at least one sample
        return hidden

    def _record(self) -> list[BlockCall]:
        """How each block is called, which must be the same for all windows."""
        calls = self._try_hands()
        if not _same(
            [(call.args, call.kwargs) for call in calls],
            [(call.args, call.kwargs) for call in self._record_window(self._windows[-1])],
        ):
            raise self._unsupported("calls its blocks with more of the text than the hidden states")
        return calls

    def _try_hands(self) -> list[BlockCall]:
        """The calls, once it is found what the blocks must return for the model to go on."""
        failed: Exception | None = None
        for self._hand in _HANDS:
            try:
                return self._record_window(self._windows[0])
            except (_Mismatch, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
                failed = error
        if isinstance(failed, _Mismatch):
            raise self._unsupported("changes the hidden states between its blocks")
        raise self._unsupported(f"can't go from block to block ({failed})") from failed

    def _unsupported(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{type(self._skeleton.model).__name__} {what}, which the layer-by-layer walk does not support. The method "
            '"magnitude" needs no walk: take it, with the uniform allocation.'
        )

    def _record_window(self, window: Tensor) -> list[BlockCall]:
        blocks = [self._skeleton.block(index) for index in range(len(self._skeleton.block_names))]
        calls: list[BlockCall] = []
        given: list[Tensor] = []

        def recorder(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split_call(args, kwargs)
            if given and hidden is not given[0]:
                raise _Mismatch
            if any(isinstance(value, _Beside) for value in (*call.args, *call.kwargs.values())):
                raise self._unsupported("hands on more than the hidden states from block to block")
            given[:] = [hidden]
            calls.append(call)
            if len(calls) == len(blocks):
                raise _Stop
            return self._hand(hidden)

        with _Replaced(blocks, [recorder] * len(blocks)):
            self._forward(window)
        return calls


class _Replaced:
    """Replaces the ``forward`` of modules while it is entered; their attributes stay readable for the model."""

    def __init__(self, modules: Iterable[nn.Module], forwards: Iterable[Callable[..., Any]]) -> None:
        self._pairs = list(zip(modules, forwards, strict=True))

    def __enter__(self) -> None:
        for module, forward in self._pairs:
            module.forward = forward  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        for module, _ in self._pairs:
            del module.forward


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states and the rest of a block's call."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), BlockCall((), rest)


def _outside(skeleton: Skeleton, blocks: tuple[str, ...]) -> Callable[[str], bool]:
    """Says of a parameter's name whether it lies before or after the blocks, the head left out: it is never run."""
    head = skeleton.model.get_output_embeddings()
    head_prefix = next((name + "." for name, module in skeleton.model.named_modules() if module is head), None)
    not_wanted = blocks if head is None or head_prefix is None else (*blocks, head_prefix)
    return lambda name: not name.startswith(not_wanted)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)
