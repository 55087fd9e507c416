"""A Hugging Face model folder as files: read tensor by tensor, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flash_llm.errors import CheckpointError
from flash_llm.files import write_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (*_PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Not part of what a model computes, and changed by whoever writes the file again.
_UNSIGNED = ("transformers_version", "_name_or_path")
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorFiles:
    """The tensors of some safetensors files, by name. Values are read when they are asked for.

    Raises:
        FileNotFoundError: a file does not exist.
        CheckpointError: a file is truncated or damaged, or two files hold the same tensor.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._place: dict[str, tuple[Path, Any]] = {}
        for file in self.files:
            handle = _open(file)
            for name in handle.offset_keys():
                if name in self._place:
                    raise CheckpointError(f"{file} and {self._place[name][0]} both hold {name}; remove one of them")
                self._place[name] = (file, handle)

    @property
    def names(self) -> list[str]:
        """All tensors, in the order in which they lie in the files."""
        return list(self._place)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def file_of(self, name: str) -> Path:
        return self._place[name][0]

    def info(self, name: str) -> TensorInfo:
        """dtype and shape of a tensor, from the header alone."""
        file, handle = self._place[name]
        part = handle.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise CheckpointError(f"{file}: {name} is stored as {part.get_dtype()}, which this release can't read")
        return TensorInfo(_DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        file, handle = self._place[name]
        try:
            return handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: {name} can't be read ({error}); copy or make the file again") from error

    def read_rows(self, name: str, rows: int) -> Tensor:
        """The first rows of a tensor."""
        return self._place[name][1].get_slice(name)[:rows]


class ModelFolder(TensorFiles):
    """A model's folder: config.json, safetensors (one file, or shards with an index), and files beside them.

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        CheckpointError: it is no model folder, has no safetensors, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"model folder {self.path} does not exist")
        self.config = read_config(self.path)
        super().__init__(self._files())

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the safetensors files."""
        return sum(file.stat().st_size for file in self.files)

    def side_files(self) -> list[Path]:
        """Files besides weights and config.json (tokenizer, generation config, custom code, ...), relative paths."""
        found = (file.relative_to(self.path) for file in sorted(self.path.rglob("*")) if file.is_file())
        return [
            file
            for file in found
            if not any(part.startswith(".") for part in file.parts)
            and not file.name.endswith(_WEIGHTS)
            and file != Path(CONFIG)
        ]

    def _files(self) -> list[Path]:
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        if (self.path / INDEX).is_file():
            return self._shards()
        pickles = [file.name for file in self.path.iterdir() if file.name.endswith(_PICKLES)]
        if pickles:
            raise CheckpointError(
                f"{self.path} has its weights only as pickles ({pickles[0]}), which can run code when they are loaded "
                f"and are never opened here; where you trust them, load the model with transformers and save_pretrained"
            )
        raise CheckpointError(f"{self.path} is no model folder: it has neither {SINGLE} nor {INDEX}")

    def _shards(self) -> list[Path]:
        index = self.path / INDEX
        try:
            shards = dict(read_json(index)["weight_map"])
            names = sorted(set(shards.values()))
            if not names or any(Path(name).name != name for name in names):
                raise ValueError(f"shards {names}")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); copy or make it again") from error
        return [self.path / name for name in names]

    def check_index(self) -> None:
        """Raises CheckpointError where the index and the shards don't agree on which tensor is where."""
        if not (self.path / INDEX).is_file() or self.files == [self.path / SINGLE]:
            return
        index = read_json(self.path / INDEX)
        if not isinstance(index.get("metadata"), dict):  # which transformers asks for
            raise CheckpointError(f"{self.path / INDEX} has no metadata: it is damaged; copy it again")
        stored = {name: self.file_of(name).name for name in self.names}
        wrong = sorted(set(index["weight_map"].items()) ^ set(stored.items()))
        if wrong:
            raise CheckpointError(f"{self.path / INDEX} and the shards don't agree on {wrong[0][0]}; copy it again")


def _open(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the model folder is incomplete: copy or make it again")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is truncated or damaged ({str(error) or type(error).__name__}); copy or make it again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object. Raises ValueError where it is none."""
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path} is no model folder: it has no {CONFIG}")
    try:
        return read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or make it again") from error


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of what a config.json says, whatever its layout, without its own digest and the writer's version."""
    signed = {key: value for key, value in config.items() if key not in _UNSIGNED}
    record = signed.get("quantization_config")
    if isinstance(record, Mapping):
        signed["quantization_config"] = {key: value for key, value in record.items() if key != "config_digest"}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MB", "10KB" (powers of 1000) or of a number.

    Raises:
        ValueError: not of that form, or less than 1.
    """
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", str(size).strip().upper())
    if not match or not int(match[1]):
        raise ValueError(f"max_shard_size={size!r}: it takes a number of bytes, or one with a unit such as '5GB'")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


@contextmanager
def new_folder(out: str | Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when the block ends well and vanishes when it doesn't.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        OSError: less disk is free than ``needed_bytes``.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"output {out} exists and is not an empty folder; remove it or name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed_bytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk: about {needed_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            f"free some, or write elsewhere",
            str(out.parent),
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class ShardWriter:
    """Writes tensors into safetensors files of at most ``max_bytes`` (or one tensor), and their index."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.nbytes = 0
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor, which must not change any more."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.nbytes += tensor.nbytes

    def close(self) -> None:
        """Writes what is left, gives the files their names, and writes the index if there are several."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._partial(1).rename(self.path / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = self.path / f"model-{number:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(file)
            weight_map |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.path / INDEX, index)

    def _flush(self) -> None:
        self._shards.append(list(self._pending))
        file = self._partial(len(self._shards))
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except SafetensorError as error:  # it reports a full disk so
            raise OSError(f"{file.parent} can't be written ({error}); is its disk full?") from error
        file.chmod(0o666 & ~_umask())  # save_file makes it readable for its owner alone
        self._pending, self._pending_bytes = {}, 0

    def _partial(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"


def copy_side_files(folder: ModelFolder, out: Path) -> None:
    """Copies what lies beside the weights. Nothing of it is executed."""
    for file in folder.side_files():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.path / file, out / file)
