"""Files written whole or not at all: under a name of their own beside the target, then renamed."""

from __future__ import annotations

import json
import os
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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
