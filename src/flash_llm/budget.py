"""How sparse a model must be for its compressed folder to fit into so many bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from flash_llm.prune.folder import prunable_layers
from flash_llm.prune.source import SourceFolder
from flash_llm.tensor.layout import STRIP_ROWS, WORD_COLUMNS, ValueKind, ceil_div

# By the bytes of a value, what padding adds to nonzeros and 1 bit an element: from 192 x 576 elements on, and to 95 %
# zeros, at most 15 % to 8-bit values and 11 % to those of 16 bits.
_PADDING = {1: 1.16, 2: 1.12}
# With fewer zeros layers of 16-bit values hardly shrink, and are left dense; with more nothing is left of a model.
_LOWEST, _HIGHEST = {1: 0.0, 2: 0.31}, 0.95
_SCALE_BYTES = 4
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """``"24GB"``, ``"22.3 GiB"`` or ``"500000000"`` as a number of bytes.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; write it like 24GB, 22.3GiB or 500000000.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def sparsity_for_bytes(
    model_dir: str | Path,
    nbytes: int,
    *,
    include_lm_head: bool = False,
    skip: Sequence[str] = (),
    values: str | ValueKind = ValueKind.BITS16,
) -> float:
    """The least sparsity with which a model fits into ``nbytes`` once it is pruned and compressed.

    Bytes depend on the number of nonzeros alone, not on where they are, so that this holds for any allocation under
    which all layers have 31 % zeros or more (with 8-bit values: any number of them). The bound on padding is cautious:
    the folder is a little smaller.

    Args:
        model_dir: dense model.
        nbytes: for all tensors of the compressed folder; an engine needs more, for activations and its cache.
        include_lm_head: as in :func:`flash_llm.prune.prune_folder`.
        skip: as there.
        values: as there.

    Returns:
        Sparsity, rounded up to a thousandth.

    Raises:
        ValueError: the model fits as it is, or wouldn't fit at 95 % zeros.
    """
    source, kind = SourceFolder(Path(model_dir)), ValueKind(values)
    value_bytes, padding = kind.nbytes, _PADDING[kind.nbytes]
    layers = prunable_layers(model_dir, include_lm_head=include_lm_head, skip=skip)
    numel = {name: math.prod(source.shape(name)) for name in source.names}
    dense = 2 * sum(numel.values())
    if dense <= nbytes:
        raise ValueError(
            f"{model_dir} takes {dense / 1e9:.3f} GB with 16 bits a weight and fits into {nbytes:,} bytes as is."
        )
    weights = sum(numel[key] for key in layers.values())
    bits = sum(_bitmap_bits(*source.shape(key)) for key in layers.values())
    rest = dense - 2 * weights
    if kind is not ValueKind.BITS16:
        rest += _SCALE_BYTES * sum(source.shape(key)[0] for key in layers.values())

    def size(sparsity: float) -> float:
        return rest + padding * (value_bytes * weights * (1 - sparsity) + bits / 8)

    if (least := size(_HIGHEST)) > nbytes:
        raise ValueError(
            f"{model_dir} can't fit into {nbytes:,} bytes: at {_HIGHEST:.0%} zeros it would still take {least:,.0f}, "
            f"{rest:,} of them in what is not pruned."
        )
    sparsity = 1 - ((nbytes - rest) / padding - bits / 8) / (value_bytes * weights)
    return max(_LOWEST[value_bytes], math.ceil(sparsity * 1000) / 1000)


def _bitmap_bits(rows: int, columns: int) -> int:
    return ceil_div(rows, STRIP_ROWS) * STRIP_ROWS * ceil_div(columns, WORD_COLUMNS) * WORD_COLUMNS
