"""Which text a method sees."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_llm.prune import CalibrationConfig, load_text
from flash_llm.prune.calibration import load_windows


def letters(texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
    """A tokenizer with a token a character."""
    assert options["add_special_tokens"] is False
    return {"input_ids": [[ord(char) for char in text] for text in texts]}


@pytest.fixture
def long(tmp_path: Path) -> Path:
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join("".join(chr(0x4E00 + i * 40 + j) for j in range(40)) for i in range(300)))
    return path


def test_windows_are_parts_of_the_text_and_none_comes_twice(long: Path) -> None:
    windows = load_windows(CalibrationConfig(str(long), samples=100, seqlen=50), letters)
    assert windows.shape == (100, 50)
    assert windows.dtype == torch.int64
    texts = ["".join(map(chr, window)) for window in windows.tolist()]
    assert all(text in long.read_text() for text in texts)
    assert len(set(texts)) == 100


def test_the_seed_says_which(long: Path) -> None:
    def draw(seed: int) -> torch.Tensor:
        return load_windows(CalibrationConfig(str(long), samples=20, seqlen=50, seed=seed), letters)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_long_texts_are_tokenised_in_pieces_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    text = "\n\n".join(str(i) * 50 for i in range(3000))
    path.write_text(text)
    windows = load_windows(CalibrationConfig(str(path), samples=len(text) // 100, seqlen=100), letters)
    pieces = {"".join(map(chr, window)) for window in windows.tolist()}
    assert pieces == {text[i : i + 100] for i in range(0, len(text) - 99, 100)}


def test_too_little_text(long: Path) -> None:
    with pytest.raises(ValueError, match="has 12598 tokens, but 128 samples of 2048 need 262144"):
        load_windows(CalibrationConfig(str(long)), letters)


@pytest.mark.parametrize(("field", "value"), [("samples", 0), ("seqlen", -1)])
def test_out_of_range(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        CalibrationConfig("text.txt", **{field: value})


def test_kinds_of_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    for name, content in {"a.txt": "one\n\ntwo", "a.jsonl": lines}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / (name + ".gz")).write_bytes(gzip.compress(content.encode()))
        for path in (tmp_path / name, tmp_path / (name + ".gz")):
            assert load_text(path) == "one\n\ntwo"


def test_wikitext_is_joined_by_rows_and_other_text_is_not(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n \n Text .\n")
    assert load_text(path) == "\n\n = Title = \n\n\n\n\n Text .\n"
    assert load_text(path, rows=False) == path.read_text()
    path.write_text("plain\ntext\n")
    assert load_text(path) == "plain\ntext\n"
    assert load_text(path, rows=True) == "plain\n\n\ntext\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\x00", "can't be read as UTF-8"),
        ("a.txt.gz", b"no gzip", "can't be read as UTF-8"),
        ("a.txt.gz", gzip.compress(b"cut" * 1000)[:-9], "can't be read as UTF-8"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'line 2: expected a JSON object with "text"'),
        ("a.jsonl", b"nonsense", "line 1"),
        ("a.jsonl", b'{"text": 3}', "must be a string, got int"),
    ],
)
def test_files_that_are_no_text(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_windows(CalibrationConfig(str(tmp_path / name), 1, 1), letters)


def test_no_such_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        load_windows(CalibrationConfig("nowhere.txt"), letters)


def test_a_data_set_is_streamed_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(list[dict[str, Any]]):
        read = 0

        def shuffle(self, seed: int, buffer_size: int) -> Stream:
            assert seed == 5
            return self

        def __iter__(self) -> Any:
            for document in super().__iter__():
                self.read += 1
                yield document

    stream = Stream({"text": chr(97 + i) * 8} for i in range(26))

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> Stream:
        assert (name, subset, split, streaming) == ("owner/name", "en", "validation", True)
        return stream

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    config = CalibrationConfig("owner/name:en:validation", samples=4, seqlen=5, seed=5)
    windows = load_windows(config, letters)
    assert stream.read == 2
    assert sorted("".join(map(chr, w)) for w in windows.tolist()) == ["aaa\n\n", "aaaaa", "bbb\n\n", "bbbbb"]


def test_data_sets_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="flash-llm\\[datasets\\]"):
        load_windows(CalibrationConfig("owner/name"), letters)
