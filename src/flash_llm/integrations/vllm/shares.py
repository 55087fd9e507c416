"""From what the files hold of a layer to one rank's share of it. Knows packed weights and nothing of vLLM.

An engine merges layers that read the same input (query, key and value; gate and up) into one, of several *parts*, and
gives each rank of a tensor-parallel group a share of every part's rows, or of the columns. One part in the files is
three or four tensors if it is packed and one if it is dense. They come in any order, are cut as soon as a part is
complete, and the shares are stacked into one weight, so that a merged layer is one launch. What is in memory at any
time is the shares so far and one part.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_llm.checkpoint import validated
from flash_llm.errors import CheckpointError, SlowPathWarning
from flash_llm.tensor import PackedWeight
from flash_llm.tensor.packed import parse_metadata, tensor_names
from flash_llm.tensor.stack import stack

Part = PackedWeight | Tensor


@dataclass(frozen=True)
class Rank:
    """A place in a tensor-parallel group of ``size``."""

    number: int = 0
    size: int = 1


@dataclass
class Shares:
    """Collects one rank's share of a layer.

    Attributes:
        name: of the layer, for errors.
        parts: the parts' names, in the order of their rows.
        rows: this rank's rows of every part.
        columns: this rank's columns.
        metadata: of the packed parts, by name, as ``PackedWeight.metadata`` gave it; of a part that is missing here
            the files hold the dense weight.
        rank: whose share it is.
        device: where the share is to be.
        whole_rows: rows of every part over all ranks, for files that hold the merged layer as one tensor.
    """

    name: str
    parts: Sequence[str]
    rows: Sequence[int]
    columns: int
    metadata: Mapping[str, Mapping[str, Any]]
    rank: Rank
    device: torch.device
    whole_rows: Sequence[int]
    _pending: dict[int | None, dict[str, Tensor]] = field(default_factory=dict)
    _done: dict[int, Part] = field(default_factory=dict)

    def add(self, part: int | None, tensor_name: str, tensor: Tensor) -> None:
        """Takes a tensor of a file.

        Args:
            part: its place in ``parts``; None where the files hold the merged layer as one.
            tensor_name: "bitmap", "values", "offsets" or "scales", or "weight" for a dense one.

        Raises:
            FormatError: a packed part is damaged.
            CheckpointError: a part comes twice, or can't be shared so.
        """
        if tensor_name == "weight":
            if tensor.numel():  # with no elements it is the placeholder: see flash_llm.checkpoint
                self._take(part, tensor)
            return
        pending = self._pending.setdefault(part, {})
        pending[tensor_name] = tensor
        name, metadata = self._record(part)
        if pending.keys() >= set(tensor_names(parse_metadata(metadata)["kind"])):
            weight = PackedWeight.from_state(self._pending.pop(part), metadata)
            self._take(part, validated(weight.to(self.device), name, metadata))

    def result(self) -> Part:
        """The share: dense if all parts were, else packed. Nothing of it is kept here.

        Where some parts' values have 8 bits and others' 16, all get 16: what they stand for is rounded to the weight's
        dtype and takes more memory than the files do. A :class:`SlowPathWarning` says so.

        Raises:
            CheckpointError: something of the layer is missing.
        """
        missing = [self.parts[i] for i in range(len(self.parts)) if i not in self._done]
        if missing:
            raise CheckpointError(
                f"the files lack {missing[0]}, which {self.name} needs: they are incomplete; copy or make them again"
            )
        shares = [self._done.pop(i) for i in range(len(self.parts))]
        dense = [share for share in shares if isinstance(share, Tensor)]
        if len(dense) == len(shares):
            return dense[0] if len(dense) == 1 else torch.cat(dense)
        packed = [PackedWeight.from_dense(share) if isinstance(share, Tensor) else share for share in shares]
        if len({weight.kind for weight in packed}) > 1:
            warnings.warn(
                f"{self.name}: some of {', '.join(self.parts)} have 8-bit values and some don't; one launch takes one "
                f"kind, so that all are held with 16-bit values",
                SlowPathWarning,
                stacklevel=2,
            )
            packed = [PackedWeight.from_dense(weight.to_dense()) for weight in packed]
        return stack(packed)

    @property
    def empty(self) -> bool:
        """Nothing has come yet."""
        return not self._done and not self._pending

    def _record(self, part: int | None) -> tuple[str, Mapping[str, Any]]:
        """A packed part's name in the files, and what config.json says of it."""
        name = self.name if part is None and len(self.parts) > 1 else self.parts[part or 0]
        metadata = self.metadata.get(name)
        if metadata is None:
            raise CheckpointError(f"{name} is packed in the files, but config.json has no record of it: make it again")
        return name, metadata

    def _take(self, part: int | None, whole: Part) -> None:
        if part is None and len(self.parts) > 1:
            self._split(whole)
            return
        place = part or 0
        if place in self._done:
            raise CheckpointError(f"the files hold {self.parts[place]} twice; remove one of them")
        rows = _share(self.parts[place], "rows", whole.shape[0], self.rows[place], self.rank)
        columns = _share(self.parts[place], "columns", whole.shape[1], self.columns, self.rank)
        self._done[place] = _cut(_cut(whole, 0, rows), 1, columns, self.device)

    def _split(self, whole: Part) -> None:
        """Takes a merged layer apart that is one in the files."""
        if whole.shape[0] != sum(self.whole_rows):
            raise CheckpointError(
                f"{self.name} has {whole.shape[0]} rows in the files and {sum(self.whole_rows)} over "
                f"{self.rank.size} ranks, so that it can't be shared; take a smaller tensor-parallel size"
            )
        top = 0
        for part, rows in enumerate(self.whole_rows):
            piece = whole[top : top + rows] if isinstance(whole, Tensor) else whole.rows(top, top + rows)
            self._take(part, piece)
            top += rows


def _share(name: str, what: str, whole: int, mine: int, rank: Rank) -> Rank:
    """Which of how many equal pieces is a rank's; several ranks may have the same one."""
    pieces = whole // mine if mine else 0
    if not pieces or whole % mine or rank.size % pieces:
        raise CheckpointError(
            f"{name} has {whole} {what}, of which each of {rank.size} ranks would have {mine}: config.json and the "
            f"files don't agree, or the tensor-parallel size doesn't divide them"
        )
    return Rank(rank.number // (rank.size // pieces), pieces)


def _cut(whole: Part, dim: int, piece: Rank, device: torch.device | None = None) -> Part:
    if isinstance(whole, PackedWeight):
        return whole.shard(dim, piece.number, piece.size)
    share = whole.shape[dim] // piece.size
    cut = whole.narrow(dim, piece.number * share, share)
    if device is None:
        return cut
    return cut.to(device, copy=cut.device.type == device.type).contiguous()  # a view would keep the whole in memory
