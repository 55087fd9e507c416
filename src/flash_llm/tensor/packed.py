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
    RETIRED_VERSIONS,
    STRIP_ROWS,
    TILE_WORDS,
    VALUE_DTYPES,
    WORD_COLUMNS,
    ValueKind,
    ceil_div,
    grid,
)
from flash_llm.tensor.quantise import choose_scales, dequantise, quantise

TENSOR_NAMES = ("bitmap", "values", "offsets")
"""Of every weight; those with 8-bit values have "scales" too."""

_NO_NUMBERS = {ValueKind.E4M3: (0x7F, 0xFF), ValueKind.INT8: (0x80,)}
"""Bytes that are no value of a kind: NaN, and -128, which the symmetric range leaves out."""


_ALIGNMENT = 256  # bytes, of tensors that share memory: as torch aligns its own


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A [M, K] matrix of float16 or bfloat16 whose zeros take one bit each. ``docs/format.md`` describes every bit.

    Nonzeros are stored as they are, or in 8 bits with a scale for each row.

    Attributes:
        shape: (M, K), rows and columns, each at least 1.
        bitmap: int32 [strips, words, 32], one bit an element.
        values: the nonzeros in the order of the tensor cores' registers: float16 or bfloat16 [8 * packets], or
            float8_e4m3fn or int8 [16 * packets].
        offsets: int32 [strips * tiles + 1], the first packet of every tile, and their number at the end.
        tile_words: bitmap words in a tile, one of ``layout.TILE_WORDS``.
        max_packets: the most packets that a lane has in any tile.
        checksum: of the tensors and of what they are read by (shape, tile size, dtype) as they were packed, or None
            where it isn't known.
        scales: float32 [M], by which the 8-bit values of each row are multiplied; None with 16-bit values.
        computed_in: with 8-bit values the matrix's dtype, float16 or bfloat16; else None, as the values have it.
    """

    shape: tuple[int, int]
    bitmap: Tensor
    values: Tensor
    offsets: Tensor
    tile_words: int
    max_packets: int
    checksum: int | None = None
    scales: Tensor | None = None
    computed_in: torch.dtype | None = None

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        *,
        tile_words: int | None = None,
        values: str | ValueKind = ValueKind.BITS16,
        scales: Tensor | None = None,
    ) -> PackedWeight:
        """Packs a dense matrix on the device that it is on.

        Args:
            dense: [M, K], float16 or bfloat16. 16-bit values keep their bits, also those of NaN, infinities and
                subnormals; -0.0 becomes 0. 8-bit values are rounded to nearest, ties to even; a nonzero that rounds to
                0 is stored as 0.
            tile_words: bitmap words in a tile; None takes what suits kernels best, see
                :func:`flash_llm.tensor.pack.choose_tile_words`.
            values: "16-bit", "float8_e4m3" or "int8".
            scales: float32 [M], of 8-bit values; None: those of least squared error among some that are tried, see
                :func:`flash_llm.tensor.quantise.choose_scales`.

        Raises:
            TypeError: ``dense`` is not a float16 or bfloat16 tensor, or ``scales`` not of float32.
            ValueError: it is not a matrix with at least one element; ``tile_words`` is not among the known sizes or too
                large for so many nonzeros; ``values`` is unknown; ``scales`` don't fit; or 8 bits are to hold NaN or
                infinities.
        """
        _check_dense(dense)
        if tile_words is not None and tile_words not in TILE_WORDS:
            raise ValueError(f"tile_words={tile_words} is not one of {TILE_WORDS}; leave it out to have it chosen")
        kind = ValueKind(values)
        bits = dense.detach().contiguous().view(torch.int16)
        if kind is ValueKind.BITS16:
            if scales is not None:
                raise ValueError("scales are for 8-bit values; leave them out, or ask for values='int8', say")
            return cls._from_raw(bits, kind, dense.dtype, None, tile_words)
        if not bool(dense.isfinite().all()):
            raise ValueError(f"NaN or infinite weights can't be stored as {kind.value}; store them with 16-bit values")
        scales = choose_scales(dense.detach(), kind) if scales is None else _checked_scales(scales, dense)
        stored = quantise(dense.detach(), scales, kind).to(torch.int16).bitwise_or_(_pack.STORED)
        raw = stored.masked_fill_(bits & 0x7FFF == 0, 0)
        return cls._from_raw(raw, kind, dense.dtype, scales, tile_words)

    @classmethod
    def _from_raw(
        cls, raw: Tensor, kind: ValueKind, dtype: torch.dtype, scales: Tensor | None, tile_words: int | None = None
    ) -> PackedWeight:
        """Of a matrix as :func:`flash_llm.tensor.pack.pack` takes it."""
        packed = _pack.pack(raw, kind, tile_words)
        if packed.max_packets * kind.packet_values > LANE_CAPACITY:
            raise ValueError(
                f"tile_words={tile_words} puts more than {LANE_CAPACITY} nonzeros into a lane of a tile; take a "
                f"smaller one, or leave it out to have it chosen"
            )
        weight = cls(
            (int(raw.shape[0]), int(raw.shape[1])),
            packed.bitmap,
            packed.values.view(kind.dtype or dtype),
            packed.offsets,
            packed.tile_words,
            packed.max_packets,
            scales=scales,
            computed_in=None if kind.dtype is None else dtype,
        )
        return replace(weight, checksum=weight._checksum())

    def _raw(self) -> Tensor:
        """What :meth:`_from_raw` was given."""
        packed = _pack.PackedTensors(self.bitmap, self.values, self.offsets, self.tile_words, self.max_packets)
        return _pack.unpack(packed, *self.shape)

    def _repacked(self, raw: Tensor, scales: Tensor | None) -> PackedWeight:
        return PackedWeight._from_raw(raw, self.kind, self.dtype, scales)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense [M, K] matrix, on this weight's device, zeros as +0.0.

        Args:
            dtype: of the result; None: the weight's own. 8-bit values times their scales are rounded to it once.
        """
        raw, dtype = self._raw(), dtype or self.dtype
        if self.scales is None:
            return raw.view(self.dtype).to(dtype)
        return dequantise(raw.to(torch.uint8), self.scales, self.kind, dtype)

    @property
    def kind(self) -> ValueKind:
        """How nonzeros are stored."""
        kind = ValueKind.of(self.values.dtype)
        if kind is None:
            raise FormatError(
                f"values of {self.values.dtype}; a packed weight holds float16, bfloat16, float8_e4m3fn or int8"
            )
        return kind

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the matrix's elements."""
        return self.computed_in or self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.bitmap.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the dense matrix would take."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

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
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def together(self) -> PackedWeight:
        """The same weight with all its tensors in one piece of memory that nothing else is in."""
        tensors = self.tensors()
        sizes = [ceil_div(tensor.nbytes, _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        places = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device).split(sizes)
        moved: dict[str, Any] = {
            name: place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for (name, tensor), place in zip(tensors.items(), places, strict=True)
        }
        return replace(self, **moved)

    def in_dtype(self, dtype: torch.dtype) -> PackedWeight:
        """The same weight as a matrix of float16 or bfloat16. 16-bit values are rounded and those that become 0 stay
        where they are; 8-bit values and scales are as they were."""
        if dtype == self.dtype:
            return self
        if self.scales is not None:
            return replace(self, computed_in=dtype, checksum=None)
        return replace(self, values=self.values.to(dtype), checksum=None)

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
        if aligned and _pack.choose_tile_words(counts, self.kind) == self.tile_words:
            most = int(_pack.tile_counts(counts, self.tile_words).max())
            strips = replace(strips, max_packets=-(-most // self.kind.packet_values))
            # Copies: a view would keep the whole weight in memory.
            copies: dict[str, Any] = {name: tensor.clone() for name, tensor in strips.tensors().items()}
            strips = replace(strips, **copies)
            return replace(strips, checksum=strips._checksum())
        top = first * STRIP_ROWS
        scales = None if self.scales is None else self.scales[start:stop].clone()
        return self._repacked(strips._raw()[start - top : stop - top], scales)

    def _columns(self, start: int, stop: int) -> PackedWeight:
        parts = []
        for first, last in _pack.strip_chunks(*self.shape, self.device):
            parts.append(self._strips(first, last)._raw()[:, start:stop].clone())
        return self._repacked(torch.cat(parts), None if self.scales is None else self.scales.clone())

    def _strips(self, first: int, last: int) -> PackedWeight:
        """A view of strips ``first`` to ``last - 1``."""
        tiles = grid(*self.shape, self.tile_words)[2]
        offsets = self.offsets[first * tiles : last * tiles + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        top, bottom = first * STRIP_ROWS, min(last * STRIP_ROWS, self.shape[0])
        per_packet = self.kind.packet_values
        return replace(
            self,
            shape=(bottom - top, self.shape[1]),
            bitmap=self.bitmap[first:last],
            values=self.values[begin * per_packet : end * per_packet],
            offsets=offsets - begin,
            checksum=None,
            scales=None if self.scales is None else self.scales[top:bottom],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by name: "bitmap", "values" and "offsets", and "scales" with 8-bit values."""
        tensors = {name: getattr(self, name) for name in TENSOR_NAMES}
        return tensors if self.scales is None else tensors | {"scales": self.scales}

    def metadata(self) -> dict[str, Any]:
        """What else must be stored, as JSON-ready values: format version, shape, tile size, counts, checksum."""
        of_8_bits = {} if self.scales is None else {"values": self.kind.value}
        return {
            "format_version": self.kind.format_version,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            **of_8_bits,
            "tile_words": self.tile_words,
            "max_packets": self.max_packets,
            "packets": self.values.numel() // self.kind.packet_values,
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
        kind: ValueKind = fields.pop("kind")
        names = tensor_names(kind)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise FormatError(f"a packed weight lacks its tensors {missing}; the file is incomplete: make it again")
        if kind.dtype is not None and tensors["values"].dtype != kind.dtype:
            raise FormatError(f"values of {tensors['values'].dtype}, but the metadata say {kind.value}: damaged")
        dtype = fields.pop("dtype")
        fields |= {name: tensors[name] for name in names}
        return cls(**fields, computed_in=kind.dtype and dtype)

    def validate(self) -> PackedWeight:
        """Proves that every offset and count is consistent, so that kernels may trust them. Returns self.

        Checks dtypes, devices and shapes; that bits beyond M and K are clear; that each tile has just the packets its
        bits call for; that 8-bit values are numbers and their scales finite and positive; and, where the checksum is
        known, that not a bit of the tensors has changed, nor the shape, the tile size or the dtype that they are read
        by.

        Raises:
            FormatError: saying what is wrong.
        """
        strips, words, tiles = self._check_shapes()
        self._check_margins(words)
        counts = _pack.tile_counts(_pack.word_counts(self.bitmap), self.tile_words)
        per_packet = self.kind.packet_values
        packets = _pack._packets(counts, per_packet)
        expected = torch.zeros(strips * tiles + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(packets.sum(-1).flatten(), 0, out=expected[1:])
        if not torch.equal(expected, self.offsets.long()):
            bad = int((expected != self.offsets).nonzero()[0])
            raise FormatError(
                f"offsets[{bad}] is {int(self.offsets[bad])}, but the bitmap calls for {int(expected[bad])}: damaged"
            )
        if self.values.numel() != per_packet * int(expected[-1]):
            raise FormatError(
                f"{self.values.numel()} values, but the bitmap calls for {per_packet * int(expected[-1])}: damaged"
            )
        if int(packets.max()) != self.max_packets:
            raise FormatError(f"max_packets is {self.max_packets}, but the bitmap says {int(packets.max())}: damaged")
        self._check_numbers()
        if self.checksum is not None and self._checksum() != self.checksum:
            raise FormatError(
                f"the weight's checksum is {self._checksum():016x}, not {self.checksum:016x} as it was when it was "
                f"packed: its values, shape or dtype are damaged; copy or make the file again"
            )
        return self

    def _check_shapes(self) -> tuple[int, int, int]:
        kind = self.kind
        if self.dtype not in VALUE_DTYPES or (kind.dtype is None) != (self.computed_in is None):
            raise FormatError(f"a matrix of {self.dtype}; a packed weight is one of float16 or bfloat16")
        if (kind.dtype is None) != (self.scales is None):
            raise FormatError(f"values of {kind.value} with{'out' if self.scales is None else ''} scales: damaged")
        if self.bitmap.dtype != torch.int32 or self.offsets.dtype != torch.int32:
            raise FormatError(f"bitmap and offsets must be int32, not {self.bitmap.dtype} and {self.offsets.dtype}")
        if len({tensor.device for tensor in self.tensors().values()}) != 1:
            raise FormatError(f"{', '.join(self.tensors())} are on different devices; move them to one")
        strips, words, tiles = grid(*self.shape, self.tile_words)
        if tuple(self.bitmap.shape) != (strips, words, LANES):
            raise FormatError(
                f"bitmap of shape {tuple(self.bitmap.shape)}; {self.shape} needs {(strips, words, LANES)}"
            )
        if tuple(self.offsets.shape) != (strips * tiles + 1,):
            raise FormatError(f"offsets of shape {tuple(self.offsets.shape)}; {self.shape} needs {strips * tiles + 1}")
        if self.values.dim() != 1 or self.values.numel() % kind.packet_values:
            raise FormatError(
                f"values of shape {tuple(self.values.shape)} are no whole packets of {kind.packet_values}"
            )
        if self.scales is not None and (self.scales.dtype, self.scales.shape) != (torch.float32, self.shape[:1]):
            raise FormatError(
                f"scales of {self.scales.dtype} and shape {tuple(self.scales.shape)}; it takes float32, one for each "
                f"of {self.shape[0]} rows"
            )
        if any(not tensor.is_contiguous() for tensor in self.tensors().values()):
            raise FormatError(f"{', '.join(self.tensors())} must be contiguous")
        return strips, words, tiles

    def _check_numbers(self) -> None:
        """That 8-bit values and their scales are what a kernel expects."""
        if self.scales is None:
            return
        if (row := _unusable(self.scales)) is not None:
            raise FormatError(f"scales[{row}] is {float(self.scales[row])}; it takes finite ones above 0: damaged")
        stored = self.values.view(torch.uint8)
        for byte in _NO_NUMBERS[self.kind]:
            if bool((stored == byte).any()):
                raise FormatError(f"there are values {byte:#04x}, which is no number in {self.kind.value}: damaged")

    def _check_margins(self, words: int) -> None:
        rows, columns = self.shape
        last_strip = self._dense_mask(self.bitmap[-1:])
        last_words = self._dense_mask(self.bitmap[:, -1:])
        below, right = last_strip[1 + (rows - 1) % STRIP_ROWS :], last_words[:, 1 + (columns - 1) % WORD_COLUMNS :]
        if bool(below.any()) or bool(right.any()):
            raise FormatError(f"the bitmap has bits set outside of {rows} x {columns}: damaged")

    def _dense_mask(self, bitmap: Tensor) -> Tensor:
        """[16 * strips, 64 * words], nonzero where a bit of ``bitmap [strips, words, 32]`` is set."""
        words = bitmap.shape[1]
        mask = _pack.mask_from_bitmap(bitmap, words, self.kind)
        return _pack._from_lane_order(mask.to(torch.int16), words, self.kind)

    def _checksum(self) -> int:
        parts = [checksum(getattr(self, name)) for name in TENSOR_NAMES]
        parts += [*self.shape, self.tile_words, VALUE_DTYPES.index(self.dtype)]
        if self.scales is not None:
            parts += [checksum(self.scales), self.kind.code]
        return sum((2 * position + 1) * part for position, part in enumerate(parts)) & ((1 << 64) - 1)

    def __repr__(self) -> str:
        stored = "" if self.scales is None else f" from {self.kind.value}"
        return (
            f"PackedWeight({self.shape[0]} x {self.shape[1]}, {str(self.dtype).removeprefix('torch.')}{stored}, "
            f"{self.nbytes / max(self.dense_nbytes, 1):.1%} of dense, tile_words={self.tile_words}, {self.device})"
        )


def tensor_names(kind: ValueKind) -> tuple[str, ...]:
    """The names of the tensors of a weight whose values are of a kind."""
    return TENSOR_NAMES if kind is ValueKind.BITS16 else (*TENSOR_NAMES, "scales")


def parse_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a PackedWeight that ``PackedWeight.metadata`` stored, checked; with its "dtype" and "kind".

    Raises:
        FormatError: an unknown format version, or an entry that is missing or makes no sense.
    """
    kind = _parse_kind(metadata)
    try:
        rows, columns = metadata["shape"]
        tile_words, max_packets = metadata["tile_words"], metadata["max_packets"]
        dtype = getattr(torch, str(metadata["dtype"]), None)
        digest = int(metadata["checksum"], 16)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"a packed weight's metadata are damaged ({error!r}): {dict(metadata)}") from error
    if any(type(number) is not int for number in (rows, columns, tile_words, max_packets)):
        raise FormatError(f"a packed weight's metadata are damaged, with other than integers: {dict(metadata)}")
    if not (1 <= rows < 2**31 and 1 <= columns < 2**31 and tile_words in TILE_WORDS and dtype in VALUE_DTYPES):
        raise FormatError(f"a packed weight's metadata are damaged: {dict(metadata)}")
    if not 0 <= max_packets * kind.packet_values <= LANE_CAPACITY:
        raise FormatError(f"max_packets={max_packets} is more than {LANE_CAPACITY // kind.packet_values}: damaged")
    fields = {"shape": (rows, columns), "tile_words": tile_words, "max_packets": max_packets, "checksum": digest}
    return fields | {"dtype": dtype, "kind": kind}


def _parse_kind(metadata: Mapping[str, Any]) -> ValueKind:
    """Version 1 knows 16-bit values alone, and version 3 is for the others."""
    version = metadata.get("format_version")
    check_version(version, "format version")
    if version == ValueKind.BITS16.format_version:
        return ValueKind.BITS16
    known = {kind.value: kind for kind in ValueKind if kind.format_version == version}
    values = metadata.get("values")
    if not isinstance(values, str) or values not in known:
        raise FormatError(
            f"values of {values!r}, which this release doesn't know in format version {version}: upgrade flash-llm, or "
            f"compress it again"
        )
    return known[values]


def check_version(version: Any, what: str, newest: int = FORMAT_VERSION) -> None:
    """Raises a FormatError that says what to do about a version that isn't known; ``what`` has it."""
    known = [number for number in range(1, newest + 1) if number not in RETIRED_VERSIONS]
    if type(version) is not int or version not in known:
        hint = "upgrade flash-llm" if isinstance(version, int) and version > newest else "compress it again"
        listed = f"{', '.join(map(str, known[:-1]))} and {known[-1]}"
        raise FormatError(f"{what} {version!r}; this release reads versions {listed}: {hint}")


def empty_state(metadata: Mapping[str, Any], device: torch.device | str = "meta") -> dict[str, Tensor]:
    """Uninitialised tensors of the shapes and dtypes that a stored weight's metadata call for."""
    fields = parse_metadata(metadata)
    rows, columns = fields["shape"]
    kind: ValueKind = fields["kind"]
    strips, words, tiles = grid(rows, columns, fields["tile_words"])
    packets = metadata.get("packets")
    if not isinstance(packets, int) or not 0 <= packets < 2**31:
        raise FormatError(f"a packed weight's metadata are damaged: {dict(metadata)}")
    state = {
        "bitmap": torch.empty(strips, words, LANES, dtype=torch.int32, device=device),
        "values": torch.empty(packets * kind.packet_values, dtype=kind.dtype or fields["dtype"], device=device),
        "offsets": torch.empty(strips * tiles + 1, dtype=torch.int32, device=device),
        "scales": torch.empty(rows, dtype=torch.float32, device=device),
    }
    return {name: state[name] for name in tensor_names(kind)}


def _unusable(scales: Tensor) -> int | None:
    """The first row whose scale is not finite and positive."""
    bad = ~(scales.isfinite() & (scales > 0))
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def _checked_scales(scales: Tensor, dense: Tensor) -> Tensor:
    if scales.dtype != torch.float32:
        raise TypeError(f"scales of {scales.dtype}; they are float32")
    if scales.shape != dense.shape[:1] or scales.device != dense.device:
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} on {scales.device}; it takes one for each of {dense.shape[0]} "
            f"rows, on {dense.device}"
        )
    if (row := _unusable(scales)) is not None:
        raise ValueError(f"scales[{row}] is {float(scales[row])}; it takes finite ones above 0")
    return scales.detach().clone()


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
