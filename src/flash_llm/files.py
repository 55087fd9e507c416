"""Files written whole or not at all: under a name of their own beside the target, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file. Writers that race leave one of their contents; one that fails leaves what was there before."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_free(folder: Path, names: Iterable[str]) -> None:
    """Makes a folder, in which no earlier run's files may be.

    Raises:
        FileExistsError: one of ``names`` is there.
    """
    check_free(folder, names)
    folder.mkdir(parents=True, exist_ok=True)


def check_free(folder: Path, names: Iterable[str]) -> None:
    """Raises FileExistsError where a folder holds one of some files."""
    if found := [name for name in names if (folder / name).exists()]:
        raise FileExistsError(f"{folder} already holds {', '.join(found)}: name another folder, or remove them")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
