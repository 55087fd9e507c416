"""PackedWeight: a sparse weight matrix as this package stores and multiplies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flash_llm.errors import FormatError
from flash_llm.tensor import pack as _pack
from flash_llm.tensor.checksum import checksum
from flash_llm.tensor.layout import (
    FORMAT_VERSION,
    LANE_CAPACITY,
    LANES,
    PACKET_VALUES,
    STRIP_ROWS,
    TILE_WORDS,
    VALUE_DTYPES,
    WORD_COLUMNS,
    grid,
)

TENSOR_NAMES = ("bitmap", "values", "offsets")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A [M, K] matrix of float16 or bfloat16 whose zeros take one bit each. ``docs/format.md`` describes every bit.

    Attributes:
        shape: (M, K), rows and columns, each at least 1.
        bitmap: int32 [strips, words, 32], one bit an element.
        values: float16 or bfloat16 [8 * packets], the nonzeros in the order of the tensor cores' registers.
        offsets: int32 [strips * tiles + 1], the first packet of every tile, and their number at the end.
        tile_words: bitmap words in a tile, one of ``layout.TILE_WORDS``.
        max_packets: the most packets that a lane has in any tile.
        checksum: of the three tensors and of what they are read by (shape, tile size, dtype) as they were packed, or
            None where it isn't known.
    """

    shape: tuple[int, int]
    bitmap: Tensor
    values: Tensor
    offsets: Tensor
    tile_words: int
    max_packets: int
    checksum: int | None = None

    @classmethod
    def from_dense(cls, dense: Tensor, *, tile_words: int | None = None) -> PackedWeight:
        """Packs a dense matrix on the device that it is on.

        Args:
            dense: [M, K], float16 or bfloat16. NaN, infinities and subnormals keep their bits; -0.0 becomes 0.
            tile_words: bitmap words in a tile; None takes what suits kernels best, see
                :func:`flash_llm.tensor.pack.choose_tile_words`.

        Raises:
            TypeError: ``dense`` is not a float16 or bfloat16 tensor.
            ValueError: it is not a matrix with at least one element, or ``tile_words`` is not among the known sizes
                or too large for so many nonzeros.
        """
        _check_dense(dense)
        if tile_words is not None and tile_words not in TILE_WORDS:
            raise ValueError(f"tile_words={tile_words} is not one of {TILE_WORDS}; leave it out to have it chosen")
        packed = _pack.pack(dense, tile_words)
        if packed.max_packets * PACKET_VALUES > LANE_CAPACITY:
            raise ValueError(
                f"tile_words={tile_words} puts more than {LANE_CAPACITY} nonzeros into a lane of a tile; take a "
                f"smaller one, or leave it out to have it chosen"
            )
        return cls._of((int(dense.shape[0]), int(dense.shape[1])), packed)

    @classmethod
    def _of(cls, shape: tuple[int, int], packed: _pack.PackedTensors) -> PackedWeight:
        weight = cls(shape, packed.bitmap, packed.values, packed.offsets, packed.tile_words, packed.max_packets)
        return replace(weight, checksum=weight._checksum())

    def to_dense(self) -> Tensor:
        """The dense [M, K] matrix, on this weight's device, zeros as +0.0."""
        return _pack.unpack(self._tensors(), *self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the matrix's elements."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.bitmap.device

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.bitmap.nbytes + self.values.nbytes + self.offsets.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the dense matrix would take."""
        return self.shape[0] * self.shape[1] * self.values.element_size()

    @property
    def nnz(self) -> int:
        """Number of nonzero elements."""
        return int(_pack.word_counts(self.bitmap).sum(dtype=torch.int64))

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        return 1 - self.nnz / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        moved = {name: getattr(self, name).to(device) for name in TENSOR_NAMES}
        return replace(self, **moved)

    def shard(self, dim: int, rank: int, world_size: int) -> PackedWeight:
        """One rank's equal share of the rows (``dim`` 0) or columns (``dim`` 1), as tensor parallelism wants it.

        Equal, bit for bit, to packing that slice of the dense matrix. Works on this weight's device; where the cut
        falls between tiles and their size need not change the packets are only copied, elsewhere they are repacked.

        Raises:
            ValueError: ``dim``, ``rank`` or ``world_size`` out of range, or a size that ``world_size`` doesn't divide.
        """
        if dim not in (0, 1):
            raise ValueError(f"dim={dim}: a weight is sharded along its rows (0) or its columns (1)")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: it takes 0 <= rank < world_size")
        size = self.shape[dim]
        if size % world_size:
            name = ("rows", "columns")[dim]
            raise ValueError(f"{size} {name} can't be shared equally by world_size={world_size}; take a divisor of it")
        share = size // world_size
        if world_size == 1:
            return self
        start, stop = rank * share, (rank + 1) * share
        return self.rows(start, stop) if dim == 0 else self._columns(start, stop)

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Rows ``start`` to ``stop - 1``, as :meth:`shard` cuts them.

        Raises:
            ValueError: that is no row at all, or beyond the last.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(
                f"rows {start} to {stop} of {self.shape[0]}: it takes 0 <= start < stop <= {self.shape[0]}"
            )
        first, last = start // STRIP_ROWS, -(-stop // STRIP_ROWS)
        strips = self._strips(first, last)
        aligned = start % STRIP_ROWS == 0 and (stop % STRIP_ROWS == 0 or stop == self.shape[0])
        counts = _pack.word_counts(strips.bitmap)
        if aligned and _pack.choose_tile_words(counts) == self.tile_words:
            most = int(_pack.tile_counts(counts, self.tile_words).max())
            strips = replace(strips, max_packets=-(-most // PACKET_VALUES))
            # Copies: a view would keep the whole weight in memory.
            strips = replace(strips, bitmap=strips.bitmap.clone(), values=strips.values.clone())
            return replace(strips, checksum=strips._checksum())
        top = first * STRIP_ROWS
        return PackedWeight.from_dense(strips.to_dense()[start - top : stop - top])

    def _columns(self, start: int, stop: int) -> PackedWeight:
        parts = []
        for first, last in _pack.strip_chunks(*self.shape, self.device):
            parts.append(self._strips(first, last).to_dense()[:, start:stop].clone())
        return PackedWeight.from_dense(torch.cat(parts))

    def _strips(self, first: int, last: int) -> PackedWeight:
        """A view of strips ``first`` to ``last - 1``."""
        tiles = grid(*self.shape, self.tile_words)[2]
        offsets = self.offsets[first * tiles : last * tiles + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        return replace(
            self,
            shape=(min(last * STRIP_ROWS, self.shape[0]) - first * STRIP_ROWS, self.shape[1]),
            bitmap=self.bitmap[first:last],
            values=self.values[begin * PACKET_VALUES : end * PACKET_VALUES],
            offsets=offsets - begin,
            checksum=None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by name: "bitmap", "values" and "offsets"."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    def metadata(self) -> dict[str, Any]:
        """What else must be stored, as JSON-ready values: format version, shape, tile size, counts, checksum."""
        return {
            "format_version": FORMAT_VERSION,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "tile_words": self.tile_words,
            "max_packets": self.max_packets,
            "packets": self.values.numel() // PACKET_VALUES,
            "nnz": self.nnz,
            "checksum": f"{self._checksum() if self.checksum is None else self.checksum:016x}",
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> PackedWeight:
        """The weight that :meth:`tensors` and :meth:`metadata` describe; :meth:`validate` it if it came from a file.

        Raises:
            FormatError: an unknown format version, a missing tensor, or metadata that make no sense.
        """
        fields = parse_metadata(metadata)
        missing = [name for name in TENSOR_NAMES if name not in tensors]
        if missing:
            raise FormatError(f"a packed weight lacks its tensors {missing}; the file is incomplete: make it again")
        return cls(bitmap=tensors["bitmap"], values=tensors["values"], offsets=tensors["offsets"], **fields)

    def validate(self) -> PackedWeight:
        """Proves that every offset and count is consistent, so that kernels may trust them. Returns self.

        Checks dtypes, devices and shapes; that bits beyond M and K are clear; that each tile has just the packets its
        bits call for; and, where the checksum is known, that not a bit of the three tensors has changed, nor the shape,
        the tile size or the dtype that they are read by.

        Raises:
            FormatError: saying what is wrong.
        """
        strips, words, tiles = self._check_shapes()
        self._check_margins(words)
        counts = _pack.tile_counts(_pack.word_counts(self.bitmap), self.tile_words)
        packets = _pack._packets(counts)
        expected = torch.zeros(strips * tiles + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(packets.sum(-1).flatten(), 0, out=expected[1:])
        if not torch.equal(expected, self.offsets.long()):
            bad = int((expected != self.offsets).nonzero()[0])
            raise FormatError(
                f"offsets[{bad}] is {int(self.offsets[bad])}, but the bitmap calls for {int(expected[bad])}: damaged"
            )
        if self.values.numel() != PACKET_VALUES * int(expected[-1]):
            raise FormatError(
                f"{self.values.numel()} values, but the bitmap calls for {PACKET_VALUES * int(expected[-1])}: damaged"
            )
        if int(packets.max()) != self.max_packets:
            raise FormatError(f"max_packets is {self.max_packets}, but the bitmap says {int(packets.max())}: damaged")
        if self.checksum is not None and self._checksum() != self.checksum:
            raise FormatError(
                f"the weight's checksum is {self._checksum():016x}, not {self.checksum:016x} as it was when it was "
                f"packed: its values, shape or dtype are damaged; copy or make the file again"
            )
        return self

    def _check_shapes(self) -> tuple[int, int, int]:
        if self.dtype not in VALUE_DTYPES:
            raise FormatError(f"values of {self.dtype}; a packed weight holds float16 or bfloat16")
        if self.bitmap.dtype != torch.int32 or self.offsets.dtype != torch.int32:
            raise FormatError(f"bitmap and offsets must be int32, not {self.bitmap.dtype} and {self.offsets.dtype}")
        if len({self.bitmap.device, self.values.device, self.offsets.device}) != 1:
            raise FormatError("bitmap, values and offsets are on different devices; move them to one")
        strips, words, tiles = grid(*self.shape, self.tile_words)
        if tuple(self.bitmap.shape) != (strips, words, LANES):
            raise FormatError(
                f"bitmap of shape {tuple(self.bitmap.shape)}; {self.shape} needs {(strips, words, LANES)}"
            )
        if tuple(self.offsets.shape) != (strips * tiles + 1,):
            raise FormatError(f"offsets of shape {tuple(self.offsets.shape)}; {self.shape} needs {strips * tiles + 1}")
        if self.values.dim() != 1 or self.values.numel() % PACKET_VALUES:
            raise FormatError(f"values of shape {tuple(self.values.shape)} are no whole packets of {PACKET_VALUES}")
        if any(not t.is_contiguous() for t in (self.bitmap, self.values, self.offsets)):
            raise FormatError("bitmap, values and offsets must be contiguous")
        return strips, words, tiles

    def _check_margins(self, words: int) -> None:
        rows, columns = self.shape
        last_strip = _pack.mask_from_bitmap(self.bitmap[-1:], words)
        last_words = _pack.mask_from_bitmap(self.bitmap[:, -1:], 1)
        below = _pack._from_lane_order(last_strip.to(torch.int16), words)[1 + (rows - 1) % STRIP_ROWS :]
        right = _pack._from_lane_order(last_words.to(torch.int16), 1)[:, 1 + (columns - 1) % WORD_COLUMNS :]
        if bool(below.any()) or bool(right.any()):
            raise FormatError(f"the bitmap has bits set outside of {rows} x {columns}: damaged")

    def _tensors(self) -> _pack.PackedTensors:
        return _pack.PackedTensors(self.bitmap, self.values, self.offsets, self.tile_words, self.max_packets)

    def _checksum(self) -> int:
        parts = [checksum(getattr(self, name)) for name in TENSOR_NAMES]
        parts += [*self.shape, self.tile_words, VALUE_DTYPES.index(self.dtype)]
        return sum((2 * position + 1) * part for position, part in enumerate(parts)) & ((1 << 64) - 1)

    def __repr__(self) -> str:
        return (
            f"PackedWeight({self.shape[0]} x {self.shape[1]}, {str(self.dtype).removeprefix('torch.')}, "
            f"{self.nbytes / max(self.dense_nbytes, 1):.1%} of dense, tile_words={self.tile_words}, {self.device})"
        )


def parse_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a PackedWeight that ``PackedWeight.metadata`` stored, checked.

    Raises:
        FormatError: an unknown format version, or an entry that is missing or makes no sense.
    """
    version = metadata.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        hint = "upgrade flash-llm" if isinstance(version, int) and version > FORMAT_VERSION else "compress it again"
        raise FormatError(f"format version {version!r}; this release reads version {FORMAT_VERSION}: {hint}")
    try:
        rows, columns = metadata["shape"]
        tile_words, max_packets = metadata["tile_words"], metadata["max_packets"]
        digest = int(metadata["checksum"], 16)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"a packed weight's metadata are damaged ({error!r}): {dict(metadata)}") from error
    if any(type(number) is not int for number in (rows, columns, tile_words, max_packets)):
        raise FormatError(f"a packed weight's metadata are damaged, with other than integers: {dict(metadata)}")
    if not (1 <= rows < 2**31 and 1 <= columns < 2**31 and tile_words in TILE_WORDS):
        raise FormatError(f"a packed weight's metadata are damaged: {dict(metadata)}")
    if not 0 <= max_packets * PACKET_VALUES <= LANE_CAPACITY:
        raise FormatError(f"max_packets={max_packets} is more than {LANE_CAPACITY // PACKET_VALUES}: damaged")
    shape = (rows, columns)
    return {"shape": shape, "tile_words": tile_words, "max_packets": max_packets, "checksum": digest}


def empty_state(metadata: Mapping[str, Any], device: torch.device | str = "meta") -> dict[str, Tensor]:
    """Uninitialised tensors of the shapes and dtypes that a stored weight's metadata call for."""
    fields = parse_metadata(metadata)
    rows, columns = fields["shape"]
    strips, words, tiles = grid(rows, columns, fields["tile_words"])
    dtype = getattr(torch, str(metadata.get("dtype")), None)
    packets = metadata.get("packets")
    if dtype not in VALUE_DTYPES or not isinstance(packets, int) or not 0 <= packets < 2**31:
        raise FormatError(f"a packed weight's metadata are damaged: {dict(metadata)}")
    return {
        "bitmap": torch.empty(strips, words, LANES, dtype=torch.int32, device=device),
        "values": torch.empty(packets * PACKET_VALUES, dtype=dtype, device=device),
        "offsets": torch.empty(strips * tiles + 1, dtype=torch.int32, device=device),
    }


def _check_dense(dense: Tensor) -> None:
    if not isinstance(dense, Tensor):
        raise TypeError(f"a tensor is needed to pack, not {type(dense).__name__}")
    if dense.dtype not in VALUE_DTYPES:
        raise TypeError(f"weights of {dense.dtype} can't be packed; convert them to float16 or bfloat16 first")
    if dense.layout != torch.strided:
        raise TypeError(f"a tensor of layout {dense.layout} can't be packed; make it dense with to_dense() first")
    if dense.dim() != 2 or dense.numel() == 0:
        raise ValueError(f"a matrix with at least one row and one column is needed, not shape {tuple(dense.shape)}")
    if dense.device.type == "meta":
        raise ValueError("a meta tensor has no values to pack; load the weights first")
