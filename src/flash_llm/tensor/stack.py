"""Several packed weights, one below the other, as one: what an engine that merges layers multiplies in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_llm.tensor import pack as _pack
from flash_llm.tensor.layout import STRIP_ROWS
from flash_llm.tensor.packed import PackedWeight


def stack(parts: Sequence[PackedWeight]) -> PackedWeight:
    """The packed weight whose rows are those of ``parts``, in order. All are of one dtype, kind, width and device.

    Equal, bit for bit, to packing the stacked dense matrix. Where every part ends with a whole strip and the tile size
    need not change, tensors are only joined; elsewhere the stack is repacked on its device, which takes the memory of
    its dense matrix for a moment.

    Raises:
        ValueError: there are no parts, or they differ in dtype, value kind, number of columns or device.
    """
    if not parts:
        raise ValueError("there is nothing to stack: it takes at least one packed weight")
    kinds = {(part.dtype, part.kind.value, part.shape[1], part.device) for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"weights of different dtype, value kind, width or device can't be stacked: {sorted(map(str, kinds))}"
        )
    if len(parts) == 1:
        return parts[0]
    if all(part.shape[0] % STRIP_ROWS == 0 for part in parts[:-1]):
        counts = torch.cat([_pack.word_counts(part.bitmap) for part in parts])
        if {part.tile_words for part in parts} == {_pack.choose_tile_words(counts, parts[0].kind)}:
            return _joined(parts)
    return parts[0]._repacked(torch.cat([part._raw() for part in parts]), _scales(parts))


def _scales(parts: Sequence[PackedWeight]) -> Tensor | None:
    scales = [part.scales for part in parts if part.scales is not None]
    return torch.cat(scales) if scales else None


def _joined(parts: Sequence[PackedWeight]) -> PackedWeight:
    """Strips follow each other in every tensor; offsets count on from where the part before ended."""
    offsets, begin = [], 0
    for part in parts:
        offsets.append(part.offsets[:-1] + begin)
        begin += int(part.offsets[-1])
    offsets.append(parts[0].offsets.new_tensor([begin]))
    return PackedWeight(
        (sum(part.shape[0] for part in parts), parts[0].shape[1]),
        torch.cat([part.bitmap for part in parts]),
        torch.cat([part.values for part in parts]),
        torch.cat(offsets),
        parts[0].tile_words,
        max(part.max_packets for part in parts),
        scales=_scales(parts),
        computed_in=parts[0].computed_in,
    )
