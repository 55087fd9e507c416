"""Folders that are free to be made, and safetensors files: written whole or not at all, and measured."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def check_out(out: Path) -> None:
    """Raises FileExistsError where a folder can't be made, since something is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"Output {out} exists and is not an empty folder; remove it or name another.")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # save_file makes it readable for its owner alone
    os.replace(temporary, path)


def data_bytes(path: Path) -> int:
    """Bytes of all tensors in a safetensors file: what follows the header, whose length stands first."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
