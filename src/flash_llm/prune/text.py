"""Reading text: plain, gzipped, JSON lines, and WikiText's rows."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path

# WikiText marks titles so, with spaces around the signs: a line that no other plain text begins with.
_WIKITEXT_TITLE = re.compile(r"\s* = [^=\n]+ = *\n")


def load_text(path: str | Path, *, rows: bool | None = None) -> str:
    """Read a text file as one string.

    Args:
        path: ``.txt`` or any other plain UTF-8 text, or ``.jsonl`` with a string ``"text"`` in each line (joined by two
            line breaks); either may be gzipped (``.gz``).
        rows: join the file's lines by two line breaks, as the SparseGPT and Wanda papers do with the rows of WikiText
            (a row keeps its own line break; a blank row is empty). None: do so if the file begins with a title of
            WikiText, `` = Title = ``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, a damaged gzip file, a line without ``"text"``, or no text at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Text file {path} does not exist.")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} can't be read as UTF-8 text: {error}") from error
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        text = "\n\n".join(_json_texts(path, text.splitlines()))
    elif rows or (rows is None and _WIKITEXT_TITLE.match(text)):
        text = "\n\n".join(line if line.strip() else "" for line in text.splitlines(keepends=True))
    if not text.strip():
        raise ValueError(f"{path} holds no text.")
    return text


def _json_texts(path: Path, lines: Iterable[str]) -> Iterable[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with "text", got {line[:60]!r}.'
            ) from error
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: "text" must be a string, got {type(text).__name__}.')
        yield text
