"""Compressed model folders: Hugging Face folder in, Hugging Face folder out, tensor by tensor.

A compressed folder is the dense one with each packed layer's ``NAME.weight`` replaced by ``NAME.weight_bitmap``,
``NAME.weight_values`` and ``NAME.weight_offsets`` (and ``NAME.weight_scales``, if values have 8 bits), and a
``quantization_config`` in config.json that says what is packed and how every tensor may be checked. The ``NAME.weight``
of the layer whose name sorts first stays, with no elements: a loader that doesn't know the format then stops at its
shape, where it would otherwise fill what it misses with random numbers.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from flash_llm.errors import CheckpointError, FormatError
from flash_llm.files import write_json
from flash_llm.folder import (
    CONFIG,
    ModelFolder,
    ShardWriter,
    TensorFiles,
    TensorInfo,
    config_digest,
    copy_side_files,
    new_folder,
    parse_size,
    read_config,
    read_json,
)
from flash_llm.layers import oriented
from flash_llm.nn import BUFFERS, DEFAULT_SKIP, TRANSPOSED, CompressReport, left_out, orientation
from flash_llm.tensor import PackedWeight, ValueKind, checksum, empty_state
from flash_llm.tensor.layout import VALUE_DTYPES
from flash_llm.tensor.packed import check_version, parse_metadata, tensor_names
from flash_llm.tensor.quantise import SCALES, is_rounded

QUANT_METHOD = "flash_llm"
FOLDER_VERSION = 4
"""Of a folder with layers that are the other way round when dense; others have their layers' newest version."""
PRUNING = "pruning.json"

WORTH = 0.85
"""A layer is packed if that takes at most this share of its dense bytes: less would cost speed for nothing."""
_WIDE = (torch.float32, torch.float64)
_SAMPLE_ROWS = 64


@dataclass
class FolderReport(CompressReport):
    """What :func:`compress_folder` did.

    Attributes:
        packed: layers that were packed, by their names in the checkpoint.
        skipped: layers that stay dense, and why.
        dtype: of the packed weights.
        values: how their nonzeros are stored: "16-bit", "float8_e4m3" or "int8".
        source_nbytes, nbytes: bytes of all tensors before and after.
        notes: what was decided without being asked, in words.
    """

    dtype: str = ""
    values: str = ""
    source_nbytes: int = 0
    nbytes: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayerInfo:
    """A linear layer of a folder.

    ``nnz`` and ``sparsity`` are None where nobody counted; ``reason`` says why a dense layer is dense; ``values`` how a
    packed one's nonzeros are stored.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    packed: bool
    nbytes: int
    dense_nbytes: int
    nnz: int | None = None
    reason: str | None = None
    values: str = ValueKind.BITS16.value

    @property
    def sparsity(self) -> float | None:
        """Share of zeros, 0 to 1."""
        return None if self.nnz is None else 1 - self.nnz / (self.shape[0] * self.shape[1])

    @property
    def ratio(self) -> float:
        """Bytes over dense bytes."""
        return self.nbytes / self.dense_nbytes


@dataclass(frozen=True)
class FolderInfo:
    """What a folder holds.

    Attributes:
        path: the folder.
        compressed: whether it is one of this package's.
        layers: all linear layers whose weight is a tensor of its own.
        other_nbytes: bytes of the other tensors: embeddings, norms, biases.
        dense: layers that can't be packed or shouldn't, and why.
        pruning: what ``pruning.json`` said, without its list of layers.
    """

    path: Path
    compressed: bool
    layers: list[LayerInfo]
    other_nbytes: int
    dense: dict[str, str] = field(default_factory=dict)
    pruning: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.other_nbytes + sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all tensors if every layer were dense."""
        return self.other_nbytes + sum(layer.dense_nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready values: "layers" and "totals" first of all."""
        layers = [asdict(layer) | {"sparsity": layer.sparsity, "ratio": layer.ratio} for layer in self.layers]
        totals = {
            "layers": len(self.layers),
            "packed_layers": sum(layer.packed for layer in self.layers),
            "linear_nbytes": sum(layer.nbytes for layer in self.layers),
            "linear_dense_nbytes": sum(layer.dense_nbytes for layer in self.layers),
            "other_nbytes": self.other_nbytes,
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "ratio": self.nbytes / max(self.dense_nbytes, 1),
        }
        head = {"path": str(self.path), "compressed": self.compressed}
        return head | {"layers": layers, "totals": totals, "dense": self.dense, "pruning": self.pruning}


def compress_folder(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    skip: Iterable[str] = DEFAULT_SKIP,
    dtype: str | torch.dtype | None = None,
    values: str | ValueKind | None = None,
    device: str | torch.device = "cpu",
    min_sparsity: float | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> FolderReport:
    """Packs the pruned linear layers of a model's folder. Everything else is copied.

    Reads and writes tensor by tensor: memory stays near one shard of the output. ``out_dir`` appears when all is
    written; after an error or an interrupt nothing is left.

    Args:
        model_dir: dense model: config.json and safetensors.
        out_dir: folder to make; must not exist, or be empty.
        skip: regular expressions; layers in whose name one is found stay dense.
        dtype: "float16" or "bfloat16": converts the model. None keeps what it is in, if that is one of the two, and
            takes bfloat16 for a float32 model, with a note in the report and a warning.
        values: how nonzeros are stored: "16-bit", as they are; or rounded to "float8_e4m3" or "int8", with a scale for
            each row. None: what the model was pruned for, see :func:`flash_llm.prune.prune_folder`, else 16 bits.
        device: where layers are packed; the result is the same.
        min_sparsity: layers with a smaller share of zeros stay dense; 0 packs all. None: layers stay dense that would
            not shrink to 85 % of their bytes, which is about those below 25 % of zeros, and with 8-bit values none.
        max_shard_size: bytes of a file, or as "5GB".
        progress: show a bar if standard error is a terminal.

    Returns:
        What was packed, what was not and why, and the bytes.

    Raises:
        ValueError: a model without linear layers, or none that gains; a bad ``dtype``, ``values``, ``min_sparsity``,
            pattern or size; weights that overflow ``dtype``, or are NaN or infinite and to be of 8 bits.
        TypeError: linear layers of integers or 8-bit floats.
        FileNotFoundError: no such model folder, or a shard is missing.
        FileExistsError: the output folder is not empty.
        CheckpointError: the folder is no model, is damaged, compressed or quantized already, has pickles only, or is of
            an architecture that transformers doesn't know.
        OSError: not enough disk.
    """
    if min_sparsity is not None and not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity={min_sparsity} must be between 0 and 1 (0 packs every layer)")
    max_bytes, device = parse_size(max_shard_size), torch.device(device)
    folder = ModelFolder(model_dir)
    _check_dense(folder)
    kind = ValueKind(values or (_pruning(folder) or {}).get("values") or ValueKind.BITS16)
    infos = {name: folder.info(name) for name in folder.names}
    report = FolderReport()
    candidates = _candidates(folder, infos, skip, report)
    if not candidates:
        raise ValueError(f"{folder.path}: none of its layers can be packed{_examples(report.skipped)}")
    target = _target_dtype(infos, candidates, dtype, report)
    report.source_nbytes = sum(info.nbytes for info in infos.values())
    pack = _Packer(device, min_sparsity, kind, _known_scales(folder, kind))
    layers: dict[str, Any] = {}
    checksums: dict[str, str] = {}
    with new_folder(out_dir, _estimate(folder, infos, candidates, target, kind)) as out:
        writer = ShardWriter(out, max_bytes)
        for name in _progress(folder.names, "Compressing", progress):
            tensor = _converted(name, folder.read(name), target)
            layer = name.removesuffix(".weight")
            turned = candidates.get(name, False)
            weight = pack(oriented(tensor, turned), name) if name in candidates else None
            if isinstance(weight, PackedWeight):
                layers[layer] = weight.metadata() | orientation(turned)
                report.packed.append(layer)
                for part, packed in weight.tensors().items():
                    writer.add(f"{layer}.{BUFFERS[part]}", packed.cpu())
                continue
            if weight is not None:
                report.skipped[layer] = weight
            _add_dense(writer, checksums, name, tensor)
        if not layers:
            raise ValueError(_nothing_gained(folder, report, candidates))
        first = min(layers)  # by name; what it is for: see the module's docstring
        _add_dense(writer, checksums, f"{first}.weight", torch.empty(0, dtype=getattr(torch, layers[first]["dtype"])))
        writer.close()
        copy_side_files(folder, out)
        record = make_record(layers, report.skipped, checksums, _pruning(folder))
        write_json(out / CONFIG, _signed(_with_dtype(folder.config, target) | {"quantization_config": record}))
    report.nbytes = writer.nbytes
    if pack.unlike:
        report.notes.append(
            f"{pack.unlike[0]} ({len(pack.unlike)} weights in all) is no longer what {SCALES} was made for: new scales "
            f"were chosen"
        )
        warnings.warn(report.notes[-1], stacklevel=2)
    report.dtype, report.values = next(iter(layers.values()))["dtype"], kind.value
    return report


def decompress_folder(
    model_dir: str | Path, out_dir: str | Path, *, max_shard_size: int | str = "5GB", progress: bool = True
) -> None:
    """Makes the dense folder again that a compressed one was packed from: the same weights, bit for bit (-0.0 is 0).

    Those that were stored in 8 bits come as they were rounded.

    Raises:
        CheckpointError, FormatError: the folder is not compressed, or damaged.
        FileNotFoundError, FileExistsError, ValueError, OSError: as :func:`compress_folder`.
    """
    max_bytes = parse_size(max_shard_size)
    folder = ModelFolder(model_dir)
    record = _checked_record(folder)
    placeholders = {name for name in record["checksums"] if name.removesuffix(".weight") in record["layers"]}
    needed = sum(layer.dense_nbytes for layer in _packed_layers(record)) + folder.bytes_on_disk
    with new_folder(out_dir, needed) as out:
        writer = ShardWriter(out, max_bytes)
        for name in _progress(folder.names, "Expanding", progress):
            layer = name.removesuffix(f".{BUFFERS['values']}")
            if layer in record["layers"]:
                turned = bool(record["layers"][layer].get(TRANSPOSED))
                writer.add(f"{layer}.weight", oriented(_read_packed(folder, record, layer).to_dense(), turned))
            elif name in record["checksums"] and name not in placeholders:
                writer.add(name, folder.read(name))
        writer.close()
        copy_side_files(folder, out)
        write_json(out / CONFIG, {key: value for key, value in folder.config.items() if key != "quantization_config"})


def read_folder(model_dir: str | Path, *, count_zeros: bool | None = None) -> FolderInfo:
    """Lists a model folder's linear layers: shapes, sparsity, bytes.

    Args:
        model_dir: compressed or dense.
        count_zeros: read the dense layers' weights to count their zeros. None: only in a dense folder. What is packed
            is never read: its numbers are in config.json.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError, FormatError: it is no model's, or damaged.
    """
    folder = ModelFolder(model_dir)
    record = folder_record(folder.config)
    layers: list[LayerInfo] = []
    if record is not None:
        _check_names(folder, record)
        layers, reasons, pruning = _packed_layers(record), record["dense"], record["pruning"]
        dense = {name: reason for name, reason in reasons.items() if f"{name}.weight" in folder}
    else:
        found = _find_linears(folder, {name: folder.info(name) for name in folder.names})
        dense = dict.fromkeys(found.layers, "not compressed") | {
            name: reason for name, reason in found.other.items() if f"{name}.weight" in folder
        }
        reasons, pruning = found.other, _pruning(folder)
    count = record is None if count_zeros is None else count_zeros
    layers += [_dense_layer(folder, name, reason, count) for name, reason in dense.items()]
    layers.sort(key=lambda info: _natural(info.name))
    total = sum(folder.info(name).nbytes for name in folder.names)
    other = total - sum(layer.nbytes for layer in layers)
    return FolderInfo(Path(model_dir), record is not None, layers, other, dict(reasons), pruning)


def load_packed(model_dir: str | Path, layer: str) -> PackedWeight:
    """One packed layer of a compressed folder, validated: [outputs, inputs], GPT-2's too.

    Raises:
        KeyError: no packed layer of that name.
        FileNotFoundError, CheckpointError, FormatError: no such folder, not compressed, or damaged.
    """
    folder = ModelFolder(model_dir)
    record = _checked_record(folder)
    if layer not in record["layers"]:
        known = next(iter(record["layers"]))
        raise KeyError(f"{folder.path} has no packed layer {layer!r}; names are like {known!r}")
    return _read_packed(folder, record, layer)


def verify_folder(model_dir: str | Path, *, progress: bool = True) -> int:
    """Checks every byte of a compressed folder's tensors, its index and its config. Returns the number of tensors.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        CheckpointError, FormatError: not compressed, of a newer version, or damaged: all damaged tensors are named.
    """
    folder = ModelFolder(model_dir)
    record = _checked_record(folder)
    folder.check_index()
    damaged = []
    for name in _progress([*record["layers"], *record["checksums"]], "Verifying", progress):
        try:
            if name in record["layers"]:
                _read_packed(folder, record, name)
            else:
                _check_dense_tensor(folder, record, name)
        except (CheckpointError, FormatError) as error:
            damaged.append(str(error))
    if damaged:
        more = f" (and {len(damaged) - 1} more damaged tensors)" if len(damaged) > 1 else ""
        raise CheckpointError(f"{folder.path}: {damaged[0]}{more}")
    return len(folder.names)


def accept_config(model_dir: str | Path) -> None:
    """Signs a compressed folder's config.json as it now is, after an edit by hand that was meant.

    Raises:
        CheckpointError: the folder is not compressed.
    """
    config = read_config(Path(model_dir))
    if folder_record(config) is None:
        raise CheckpointError(f"{model_dir} is not compressed: its {CONFIG} needs no signature")
    write_json(Path(model_dir) / CONFIG, _signed(config))


# What config.json records, for this module and for the loaders in `integrations`.


def make_record(
    layers: Mapping[str, Any], dense: Mapping[str, str], checksums: Mapping[str, str], pruning: Any
) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed folder, still without its ``config_digest``.

    Args:
        layers: ``PackedWeight.metadata`` and ``nn.orientation`` by the layers' names in the checkpoint.
        dense: linear layers that are not packed, and why.
        checksums: :func:`fingerprint` of all other tensors.
        pruning: how the model was pruned, or None.
    """
    turned = any(metadata.get(TRANSPOSED) for metadata in layers.values())
    newest = max((metadata["format_version"] for metadata in layers.values()), default=1)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FOLDER_VERSION if turned else newest,
        "layers": dict(layers),
        "dense": dict(dense),
        "checksums": dict(checksums),
        "pruning": pruning,
    }


def fingerprint(tensor: Tensor) -> str:
    """dtype, shape and checksum of a dense tensor in one string, such as ``bfloat16[576]:00a1...``."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}{list(tensor.shape)}:{checksum(tensor):016x}".replace(" ", "")


def folder_record(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a compressed folder's config.json; None if the folder is not compressed.

    Raises:
        FormatError: of another format version.
        CheckpointError: parts are missing or of the wrong kind.
    """
    record = config.get("quantization_config")
    if not isinstance(record, Mapping) or record.get("quant_method") != QUANT_METHOD:
        return None
    check_record(record)
    return dict(record)


def check_record(record: Mapping[str, Any]) -> None:
    """Checks the version of a ``quantization_config`` and that all its parts are there. Raises as folder_record."""
    check_version(record.get("format_version"), "compressed folder of format version", FOLDER_VERSION)
    wrong = [part for part in ("layers", "dense", "checksums") if not isinstance(record.get(part), Mapping)]
    if wrong or not all(isinstance(metadata, Mapping) for metadata in record["layers"].values()):
        raise CheckpointError(
            f"the quantization_config in {CONFIG} is damaged (in {wrong or ['layers']}); make it again"
        )


def check_config(path: Path) -> None:
    """Checks that a compressed folder's config.json is, but for layout, as it was written.

    Raises:
        CheckpointError: it is not; the message says how to accept an edit.
    """
    config = read_config(path)
    record = config.get("quantization_config")
    signed = record.get("config_digest") if isinstance(record, Mapping) else None
    if signed != config_digest(config):
        raise CheckpointError(
            f"{path / CONFIG} is not as it was written. If it is damaged, copy or make the folder again; if you edited "
            f"it, accept that with flash_llm.checkpoint.accept_config({str(path)!r})"
        )


def check_tensors(files: TensorFiles, record: Mapping[str, Any]) -> None:
    """Checks that a folder has just the tensors it should have, of the right shapes; and the dense ones' values.

    The packed ones' values are for :meth:`PackedWeight.validate`, best on the device where they are going to be.

    Raises:
        CheckpointError: saying which tensor is missing, unknown or damaged.
        FormatError: a layer's metadata make no sense.
    """
    _check_names(files, record)
    for layer, metadata in record["layers"].items():
        for part, tensor in empty_state(metadata).items():
            name = f"{layer}.{BUFFERS[part]}"
            expected = TensorInfo(tensor.dtype, tuple(tensor.shape))
            if files.info(name) != expected:
                raise CheckpointError(f"{name} is {files.info(name)}, not {expected}: damaged; copy or make it again")
    for name in record["checksums"]:
        _check_dense_tensor(files, record, name)


def _signed(config: dict[str, Any]) -> dict[str, Any]:
    record = config["quantization_config"] | {"config_digest": config_digest(config)}
    return config | {"quantization_config": record}


def _checked_record(folder: ModelFolder) -> dict[str, Any]:
    """The record of a compressed folder, with config and names of tensors checked."""
    record = folder_record(folder.config)
    if record is None:
        raise CheckpointError(f"{folder.path} is not compressed; make it so with flash_llm.checkpoint.compress_folder")
    check_config(folder.path)
    _check_names(folder, record)
    return record


def _check_names(files: TensorFiles, record: Mapping[str, Any]) -> None:
    packed = {name for layer, metadata in record["layers"].items() for name in stored_names(layer, metadata).values()}
    expected, stored = packed | set(record["checksums"]), set(files.names)
    for wrong, what in ((expected - stored, "lack"), (stored - expected, "have an unknown tensor")):
        if wrong:
            place = files.files[0].parent
            raise CheckpointError(
                f"the safetensors in {place} {what} {min(wrong)} ({len(wrong)} in all), by what config.json says; "
                f"copy or make the folder again"
            )


def _check_dense_tensor(files: TensorFiles, record: Mapping[str, Any], name: str) -> None:
    found = fingerprint(files.read(name))
    if found != record["checksums"][name]:
        raise CheckpointError(
            f"{name} is {found}, not {record['checksums'][name]} as it was written: it is damaged; copy or make the "
            f"folder again"
        )


def _read_packed(folder: ModelFolder, record: Mapping[str, Any], layer: str) -> PackedWeight:
    tensors = {part: folder.read(name) for part, name in stored_names(layer, record["layers"][layer]).items()}
    return validated(PackedWeight.from_state(tensors, record["layers"][layer]), layer, record["layers"][layer])


def stored_names(layer: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The names in the files of a packed layer's tensors, by what they are: "bitmap" and so on.

    Raises:
        FormatError: the metadata make no sense.
    """
    return {part: f"{layer}.{BUFFERS[part]}" for part in tensor_names(parse_metadata(metadata)["kind"])}


def validated(weight: PackedWeight, layer: str, metadata: Mapping[str, Any]) -> PackedWeight:
    """``weight.validate()``, and that it is what its metadata say, with the layer named in the errors."""
    try:
        weight.validate()
        counted = weight.metadata()
        wrong = sorted(key for key in counted if counted[key] != metadata.get(key))
        if wrong:
            raise FormatError(f"{wrong[0]} is {metadata.get(wrong[0])!r}, but the tensors say {counted[wrong[0]]!r}")
    except FormatError as error:
        raise FormatError(f"{layer}: {error}") from error
    return weight


def pack_if_smaller(dense: Tensor) -> PackedWeight | str:
    """A layer's weight packed on the device that it is on, or, in words, why it is better left dense."""
    return _Packer(dense.device, None)(dense)


# Steps of compress_folder.


def _check_dense(folder: ModelFolder) -> None:
    record = folder.config.get("quantization_config")
    if record is None:
        return
    method = record.get("quant_method") if isinstance(record, Mapping) else record
    if method == QUANT_METHOD:
        raise CheckpointError(f"{folder.path} is compressed already; decompress_folder makes it dense again")
    raise CheckpointError(f"{folder.path} is quantized ({method}); compress the float16 or bfloat16 original")


def _find_linears(folder: ModelFolder, infos: Mapping[str, TensorInfo]) -> Any:
    from flash_llm.structure import find_linears, meta_model  # here, as it takes seconds to import transformers

    architectures = folder.config.get("architectures") or ()
    model = meta_model(folder.path, [name for name in architectures if isinstance(name, str)])
    return find_linears(model, {name: info.shape for name, info in infos.items()})


def _candidates(
    folder: ModelFolder, infos: Mapping[str, TensorInfo], skip: Iterable[str], report: FolderReport
) -> dict[str, bool]:
    """Names of the tensors that may be packed, and whether they are [inputs, outputs]; others go into the report."""
    skip = [skip] if isinstance(skip, str) else list(skip)
    try:
        patterns = [re.compile(pattern) for pattern in skip]
    except re.error as error:
        raise ValueError(f"skip: {error.pattern!r} is no regular expression: {error}") from error
    found = _find_linears(folder, infos)
    report.skipped.update(found.other)
    candidates = {}
    for layer in found.layers:
        reason = left_out(layer, patterns, found.head)
        if reason is not None:
            report.skipped[layer] = reason
            continue
        dtype = infos[f"{layer}.weight"].dtype
        if dtype not in (*VALUE_DTYPES, *_WIDE):
            raise TypeError(f"{folder.path}: {layer}.weight is of {dtype}; take the float16 or bfloat16 original")
        candidates[f"{layer}.weight"] = layer in found.turned
    return candidates


def _target_dtype(
    infos: Mapping[str, TensorInfo], candidates: Collection[str], dtype: str | torch.dtype | None, report: FolderReport
) -> torch.dtype | None:
    """The dtype to convert the model to, or None to leave every tensor as it is."""
    if dtype is not None:
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if found not in VALUE_DTYPES:
            raise ValueError(f"dtype={dtype} can't be packed; it takes 'float16' or 'bfloat16'")
        return found
    wide = next((infos[name].dtype for name in sorted(candidates) if infos[name].dtype in _WIDE), None)
    if wide is None:
        return None
    report.notes.append(
        f"the model is {str(wide).removeprefix('torch.')} and packed weights are of 16 bits: it was converted to "
        f"bfloat16; pass dtype='float16' or 'bfloat16' to choose"
    )
    warnings.warn(report.notes[-1], stacklevel=3)
    return torch.bfloat16


def _converted(name: str, tensor: Tensor, target: torch.dtype | None) -> Tensor:
    if target is None or tensor.dtype == target or tensor.dtype not in (*VALUE_DTYPES, *_WIDE):
        return tensor
    converted = tensor.to(target)
    if not torch.equal(converted.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} has numbers too large for {target}; take dtype='bfloat16'")
    return converted


class _Packer:
    """Packs a layer, or says why it is better left dense."""

    def __init__(
        self,
        device: torch.device,
        min_sparsity: float | None,
        kind: ValueKind = ValueKind.BITS16,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.device, self.min_sparsity, self.kind = device, min_sparsity, kind
        self.scales = scales or {}
        self.unlike: list[str] = []
        """Weights that aren't what their scales were chosen for."""

    def __call__(self, dense: Tensor, name: str = "") -> PackedWeight | str:
        dense = dense.to(self.device)
        density = int(dense.count_nonzero()) / dense.numel()
        sparsity = f"{1 - density:.1%} zeros"
        if self.min_sparsity is not None:
            if 1 - density < self.min_sparsity:
                return f"it has {sparsity}, less than {self.min_sparsity:.0%}"
            return self._pack(dense, name)
        if density * self.kind.nbytes / 2 + 1 / 16 > WORTH:  # the nonzeros and a bit an element: the least it takes
            return f"with {sparsity} it would not shrink to {WORTH:.0%}"
        weight = self._pack(dense, name)
        if weight.nbytes > WORTH * weight.dense_nbytes:
            return f"with {sparsity} it would only shrink to {weight.nbytes / weight.dense_nbytes:.0%}"
        return weight

    def _pack(self, dense: Tensor, name: str) -> PackedWeight:
        scales = self.scales.get(name)
        if scales is not None and not is_rounded(dense, scales := scales.to(self.device), self.kind):
            self.unlike.append(name)
            scales = None
        return PackedWeight.from_dense(dense, values=self.kind, scales=scales)


def _known_scales(folder: ModelFolder, kind: ValueKind) -> dict[str, Tensor]:
    """Those with which the model's weights were rounded when it was pruned, if that was to the same kind of values."""
    file = folder.path / SCALES
    if kind is ValueKind.BITS16 or not file.is_file() or (_pruning(folder) or {}).get("values") != kind.value:
        return {}
    scales = TensorFiles([file])
    return {name: scales.read(name) for name in scales.names}


def _estimate(
    folder: ModelFolder,
    infos: Mapping[str, TensorInfo],
    candidates: Collection[str],
    target: torch.dtype | None,
    kind: ValueKind,
) -> int:
    """Bytes of the output, roughly: the first rows of a layer tell how sparse it is."""
    total = 0
    for name, info in infos.items():
        size = info.numel * (target or info.dtype).itemsize if info.dtype.is_floating_point else info.nbytes
        if name in candidates:
            sample = folder.read_rows(name, _SAMPLE_ROWS)
            share = int(sample.count_nonzero()) / max(sample.numel(), 1) * kind.nbytes / 2
            size = min(size, int(size * (share + 0.1)))
        total += size
    return total


def _nothing_gained(folder: ModelFolder, report: FolderReport, candidates: Collection[str]) -> str:
    reasons = {name: reason for name, reason in report.skipped.items() if f"{name}.weight" in candidates}
    return (
        f"{folder.path}: no layer would gain by being packed{_examples(reasons)}. Prune the model first, with "
        f"flash_llm.prune; or pack all the same with min_sparsity=0"
    )


def _examples(reasons: Mapping[str, str]) -> str:
    """For each reason the first layer that stays dense for it."""
    first: dict[str, str] = {}
    for name, reason in reasons.items():
        first.setdefault(reason, name)
    shown = [f"{name}: {reason}" for reason, name in first.items()][:3]
    return f" ({'; '.join(shown)})" if shown else ""


def _add_dense(writer: ShardWriter, checksums: dict[str, str], name: str, tensor: Tensor) -> None:
    writer.add(name, tensor)
    checksums[name] = fingerprint(tensor)


def _with_dtype(config: dict[str, Any], target: torch.dtype | None) -> dict[str, Any]:
    if target is None:
        return config
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return kept | {"dtype": str(target).removeprefix("torch.")}


def _pruning(folder: ModelFolder) -> dict[str, Any] | None:
    """How the model was pruned, without the numbers of every layer."""
    if not (folder.path / PRUNING).is_file():
        return None
    try:
        record = read_json(folder.path / PRUNING)
    except ValueError as error:
        raise CheckpointError(f"{folder.path / PRUNING} is damaged ({error}); remove it or make it again") from error
    return {key: value for key, value in record.items() if key != "layers"}


# Steps of read_folder.


def _packed_layers(record: Mapping[str, Any]) -> list[LayerInfo]:
    layers = []
    for name, metadata in record["layers"].items():
        state = empty_state(metadata)
        nbytes = sum(tensor.nbytes for tensor in state.values())
        rows, columns = (int(size) for size in metadata["shape"])
        dtype, values = metadata["dtype"], metadata.get("values", ValueKind.BITS16.value)
        dense = rows * columns * getattr(torch, dtype).itemsize
        nnz = metadata.get("nnz")
        layers.append(LayerInfo(name, (rows, columns), dtype, True, nbytes, dense, nnz, values=values))
    return layers


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _dense_layer(folder: ModelFolder, name: str, reason: str, count: bool) -> LayerInfo:
    info = folder.info(f"{name}.weight")
    rows, columns = (*info.shape, 1)[:2]
    nnz = int(folder.read(f"{name}.weight").count_nonzero()) if count else None
    dtype = str(info.dtype).removeprefix("torch.")
    return LayerInfo(name, (rows, columns), dtype, False, info.nbytes, info.nbytes, nnz, reason)


def _progress(names: Iterable[str], title: str, progress: bool) -> Iterator[str]:
    console = Console(file=sys.stderr)
    names = list(names)
    show: Callable[..., Iterable[str]] = track
    yield from show(names, title, console=console, disable=not (progress and console.is_terminal), transient=True)
