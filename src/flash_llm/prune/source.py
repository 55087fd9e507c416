"""A Hugging Face model folder, read tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from flash_llm.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATING = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_SIDE_FILES_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


class SourceFolder:
    """A dense model's folder: config.json, safetensors (one file, or shards with an index), tokenizer.

    Opening reads the headers of all shards, which shows truncated files at once; tensors are mapped when they are read.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: it is no model's folder, is damaged, incomplete or quantised, or of an unknown architecture.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"Model folder {folder} does not exist.")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} is no Hugging Face model folder: it has no config.json.")
        self.folder = folder
        self.config = self._load_config()
        self._open: dict[str, Any] = {}
        self._shard_of: dict[str, str] = {}
        for shard, names in self._shards().items():
            self._open_shard(shard, names)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    @property
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the shards."""
        return list(self._shard_of)

    @property
    def shards(self) -> dict[str, list[str]]:
        """The safetensors files, and the names of the tensors in each."""
        shards: dict[str, list[str]] = {}
        for name, shard in self._shard_of.items():
            shards.setdefault(shard, []).append(name)
        return shards

    def copy_index(self, target: Path) -> None:
        """Copy the index of the shards into a folder that has the same ones, if they have one."""
        if _SINGLE not in self._open:
            shutil.copyfile(self.folder / _INDEX, target / _INDEX)

    @property
    def nbytes(self) -> int:
        """Size of the safetensors files in bytes."""
        return sum((self.folder / shard).stat().st_size for shard in self._open)

    def identity(self) -> list[list[str | int]]:
        """Name, size and time of change of config and shards: tells whether the model changed meanwhile."""
        files = [self.folder / name for name in ["config.json", *self._open]]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor."""
        return self._slice(name).get_shape()

    def stored_dtype(self, name: str) -> str:
        """dtype of a tensor as safetensors writes it: F16, BF16, F32, I8, ..."""
        return self._slice(name).get_dtype()

    def is_floating(self, name: str) -> bool:
        """Whether a tensor holds plain floating-point numbers of 16 bits or more."""
        return self.stored_dtype(name) in _FLOATING

    def read(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: its shard is damaged.
        """
        try:
            return self._open[self._shard_of[name]].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"Tensor {name} of {self.folder} can't be read: {error}") from error

    def side_files(self) -> list[Path]:
        """All that belongs to the model besides its weights: config, tokenizer, chat template, ..."""
        return [
            file
            for file in sorted(self.folder.iterdir())
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith((*_SIDE_FILES_NOT_COPIED, ".index.json"))
        ]

    def _load_config(self) -> PretrainedConfig:
        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder}/config.json is not one that transformers can read: {error}"
            ) from error
        if (quantization := getattr(config, "quantization_config", None)) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(f"{self.folder} is quantised or packed already ({method}); prune the original model.")
        return config

    def _shards(self) -> dict[str, list[str] | None]:
        """Names of the tensors in each shard; None where only the shard knows.

        Where there are both, the single file is the model, as transformers reads it.
        """
        if (self.folder / _SINGLE).is_file():
            return {_SINGLE: None}
        if not (self.folder / _INDEX).is_file():
            raise CheckpointError(
                f"{self.folder} has neither {_SINGLE} nor {_INDEX}; only safetensors are read "
                "(save_pretrained of transformers writes them)."
            )
        try:
            weight_map = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards: dict[str, list[str] | None] = {}
            for name, shard in weight_map.items():
                if Path(shard).name != shard:
                    raise ValueError(f"shard {shard!r} lies outside the folder")
                names = shards.setdefault(shard, [])
                if names is not None:
                    names.append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.folder / _INDEX} is damaged: {error}") from error
        return shards

    def _open_shard(self, shard: str, names: list[str] | None) -> None:
        path = self.folder / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though the index names it; fetch the model again.")
        try:
            self._open[shard] = handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}. Fetch the model again.") from error
        stored = set(handle.keys())
        if missing := sorted(set(names or ()) - stored):
            raise CheckpointError(
                f"{path} lacks tensor {missing[0]}, though the index names it; fetch the model again."
            )
        for name in names if names is not None else sorted(stored):
            self._shard_of[name] = shard

    def _slice(self, name: str) -> Any:
        return self._open[self._shard_of[name]].get_slice(name)
