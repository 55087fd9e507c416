"""Perplexity, measured as in the SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695) papers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flash_llm.progress import progress_bar
from flash_llm.prune.text import load_text

__all__ = ["PerplexityResult", "load_text", "perplexity"]

# Logits are turned to float32 this many elements at a time: 64 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity with what it was measured over.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the predicted tokens.
        tokens: number of predicted tokens, over which the mean is taken.
        windows: number of windows.
        window: tokens in a window.
        stride: tokens between the starts of two windows.
        seconds: wall-clock time of the measurement.
    """

    perplexity: float
    tokens: int
    windows: int
    window: int
    stride: int
    seconds: float


@torch.no_grad()
def perplexity(
    model: nn.Module,
    text: str | Tensor,
    tokenizer: Any = None,
    *,
    window: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> PerplexityResult:
    """Perplexity of a causal language model over a text.

    The text is tokenised as one string (with the tokenizer's own special tokens, so at most one at its start) and cut
    into windows; a rest shorter than a window is dropped. In a window the first token is context alone and each of the
    ``window - 1`` others is predicted. With windows that don't overlap this is the protocol of the papers.

    Args:
        model: a causal language model of transformers, or a module that maps ids ``[B, window]`` to an output with
            ``logits [B, window, vocab]``. It is run in its own dtype, on its own device; the loss is float32.
        text: text (see :func:`load_text`), or its token ids, int64 ``[tokens]`` or ``[1, tokens]``.
        tokenizer: the model's tokenizer; needed with text only.
        window: tokens in a window, at least 2.
        stride: tokens between the starts of two windows, 1 to ``window``; smaller ones give more context, and each
            token is predicted once, by the first window that can. Default: ``window``.
        max_windows: take only the first windows.
        batch_size: windows at a time.
        progress: show a bar if standard error is a terminal.

    Raises:
        ValueError: an argument out of range, a text shorter than a window, a window longer than the model's
            positions, ids outside its vocabulary, or a loss that is not finite.
        TypeError: text without a tokenizer.
    """
    stride = window if stride is None else stride
    _check_arguments(model, window, stride, max_windows, batch_size)
    ids = _token_ids(model, text, tokenizer)
    if ids.numel() < window:
        raise ValueError(f"The text has {ids.numel()} tokens, a window {window}: give more text or a smaller window.")
    windows = ids.unfold(0, window, stride)[:max_windows]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    start = time.perf_counter()
    # One sum a window, in float64: the result doesn't depend on the batch size by more than the model's rounding.
    total, tokens = 0.0, 0
    try:
        with progress_bar(progress, transient=True) as bar:
            task = bar.add_task("perplexity", total=len(windows))
            for first in range(0, len(windows), batch_size):
                batch = windows[first : first + batch_size].to(device)
                logits = model(input_ids=batch, use_cache=False).logits
                for row in range(len(batch)):
                    new = window - 1 if first + row == 0 else min(stride, window - 1)
                    total += _nll(logits[row, -new - 1 : -1], batch[row, -new:])
                    tokens += new
                bar.advance(task, len(batch))
    finally:
        model.train(training)
    if not math.isfinite(total):
        raise ValueError(f"The model's loss is {total}: its weights or activations overflow; try bfloat16 or float32.")
    mean = total / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return PerplexityResult(value, tokens, len(windows), window, stride, time.perf_counter() - start)


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood of ``targets [T]`` under ``logits [T, vocab]``."""
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    pairs = zip(logits.split(rows), targets.split(rows), strict=True)
    losses = [functional.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in pairs]
    return torch.cat(losses).double().sum().item()


def _token_ids(model: nn.Module, text: str | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("A text needs the model's tokenizer; pass it, or token ids instead of the text.")
        # verbose=False: the text is longer than the model's positions, and that is meant.
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    else:
        ids = text
    ids = ids.detach().cpu()
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1):
        raise ValueError(
            f"Token ids must be int64 of shape [tokens] or [1, tokens], not {ids.dtype} {list(ids.shape)}."
        )
    ids = ids.flatten()
    vocab = getattr(_text_config(model), "vocab_size", None)
    if ids.numel() and vocab is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"Token ids run from {int(ids.min())} to {int(ids.max())}, the model's vocabulary from 0 to {vocab - 1}: "
            "the tokenizer is not the model's."
        )
    return ids


def _check_arguments(model: nn.Module, window: int, stride: int, max_windows: int | None, batch_size: int) -> None:
    if window < 2:
        raise ValueError(f"window={window}: a window needs at least 2 tokens, one to predict the other from.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be from 1 to the window, {window}.")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows} must be at least 1.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ValueError(f"window={window} is longer than the model's {positions} positions; take a smaller window.")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
