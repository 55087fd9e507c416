"""Calibration data: windows of tokens, drawn by a seed from a text file or a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_llm.prune.text import load_text

_FILE_ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".raw", ".gz")
# Long texts are tokenised in pieces of about so many characters, cut at blank lines: faster, and little memory.
_PIECE = 1 << 16


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text a pruning method sees.

    Attributes:
        source: a text file (``.txt``, ``.jsonl`` with ``"text"``, either with ``.gz``), or a data set of the library
            ``datasets`` as ``name``, ``name:config`` or ``name:config:split`` (by default split ``train``; column
            ``text``).
        samples: number of windows.
        seqlen: tokens in a window.
        seed: which windows.
    """

    source: str
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", str(self.source))
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: calibration needs at least 1 window.")
        if self.seqlen < 1:
            raise ValueError(f"seqlen={self.seqlen}: a calibration window needs at least 1 token.")


def load_windows(config: CalibrationConfig, tokenizer: Any) -> Tensor:
    """Draw the calibration windows.

    The text is tokenised without special tokens and cut into windows that don't overlap; the seed says which of them
    are taken, and none is taken twice. The same arguments give the same windows.

    Args:
        config: what to draw.
        tokenizer: the model's tokenizer.

    Returns:
        Token ids, int64 ``[samples, seqlen]``.

    Raises:
        FileNotFoundError: the source looks like a file and does not exist.
        ImportError: the source is a data set and ``datasets`` is not installed.
        ValueError: too little text, or a file that is no text.
    """
    needed = config.samples * config.seqlen
    ids = load_ids(config.source, tokenizer, needed, config.seed)
    if len(ids) < needed:
        raise ValueError(
            f"{config.source} has {len(ids)} tokens, but {config.samples} samples of {config.seqlen} need {needed}: "
            "give more text, fewer samples or shorter ones."
        )
    windows = ids[: len(ids) // config.seqlen * config.seqlen].view(-1, config.seqlen)
    generator = torch.Generator().manual_seed(config.seed)
    return windows[torch.randperm(len(windows), generator=generator)[: config.samples]].clone()


def load_ids(source: str, tokenizer: Any, needed: int, seed: int) -> Tensor:
    """Token ids of a text, without special tokens: int64 ``[tokens]``, not to be changed, since a file's are kept.

    Args:
        source: a text file or a data set, as in :class:`CalibrationConfig`.
        tokenizer: the model's tokenizer.
        needed: tokens after which reading of a data set ends; a file is read as a whole.
        seed: of the order of a data set's documents.

    Raises:
        FileNotFoundError, ImportError, ValueError: as :func:`load_windows`.
    """
    path = Path(source)
    if path.is_file() or source.endswith(_FILE_ENDINGS):
        return _file_ids(path, path.stat().st_mtime_ns if path.is_file() else 0, _Tokenizer(tokenizer))
    return torch.tensor(_from_dataset(source, tokenizer, needed, seed), dtype=torch.int64)


def digest(windows: Tensor) -> str:
    """sha256 of token ids: says whether two runs saw the same calibration data."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


class _Tokenizer:
    """A tokenizer that equals another with the same vocabulary and rules: what is kept of a text holds for both."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._key = tokenizer if backend is None else backend.to_str()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokenizer) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=2)
def _file_ids(path: Path, changed: int, tokenizer: _Tokenizer) -> Tensor:
    """Ids of a file that was last changed at a time; kept for a program that prunes or trains several times."""
    return torch.tensor(_tokenise(list(_pieces(load_text(path))), tokenizer.tokenizer), dtype=torch.int64)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + _PIECE)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def _tokenise(texts: list[str], tokenizer: Any) -> list[int]:
    # verbose=False: pieces are longer than the model's positions, and that is meant.
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return list(chain.from_iterable(ids))


def _from_dataset(source: str, tokenizer: Any, needed: int, seed: int) -> list[int]:
    """Ids of as many documents of a data set, shuffled by the seed, as are needed. It is streamed, not downloaded."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"Source {source!r} of text is no file, and data sets need the datasets library: "
            "name a text file, or pip install 'flash-llm[datasets]'."
        ) from error
    name, subset, split = [*source.split(":"), "", ""][:3]
    documents = load_dataset(name, subset or None, split=split or "train", streaming=True)
    ids: list[int] = []
    for document in documents.shuffle(seed=seed, buffer_size=10_000):
        if not isinstance(document.get("text"), str):
            raise ValueError(f"Data set {source!r} has no column of strings named text, but {sorted(document)}.")
        ids += _tokenise([document["text"] + "\n\n"], tokenizer)
        if len(ids) >= needed:
            break
    return ids
