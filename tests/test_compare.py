"""Folders side by side: the figures are those of each folder alone, and the report's files hold them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from flash_llm import compare
from flash_llm.checkpoint import compress_folder, read_folder
from flash_llm.cli import app
from flash_llm.tasks import run_tasks
from tiny_models import VOCABULARY, pruned_folder

WINDOW = ["--window", "32", "--max-windows", "3"]


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``half``, ``most`` and ``small``, the latter being ``most`` compressed, and ``text.txt``."""
    home = tmp_path_factory.mktemp("compare")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, sparsity in (("half", 0.5), ("most", 0.8)):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(home / name)
        written = (home / name / "tokenizer.json").read_bytes()
        pruned_folder(home / name, sparsity=sparsity)
        (home / name / "tokenizer.json").write_bytes(written)
    compress_folder(home / "most", home / "small", min_sparsity=0, progress=False)
    (home / "text.txt").write_text(" ".join(f"w{i * i % VOCABULARY}" for i in range(200)))
    return home


def test_the_rows_are_those_of_each_folder_alone(home: Path) -> None:
    folders = [home / name for name in ("half", "most", "small")]
    result = run("compare", *folders, "--text", home / "text.txt", *WINDOW, "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    for folder, row in zip(folders, rows, strict=True):
        alone = json.loads(run("evaluate", folder, "--text", home / "text.txt", *WINDOW, "--json").stdout)
        assert {key: row[key] for key in ("perplexity", "windows", "tokens", "dtype")} == {
            key: alone[key] for key in ("perplexity", "windows", "tokens", "dtype")
        }
        assert row["nbytes"] == read_folder(folder).nbytes
        assert row["name"] == folder.name
    assert [row["sparsity"] for row in rows] == pytest.approx([0.5, 0.8, 0.8], abs=0.03)
    assert [row["compressed"] for row in rows] == [False, False, True]
    assert rows[2]["nbytes"] < rows[2]["dense_nbytes"] == rows[1]["nbytes"] == rows[0]["nbytes"]


def test_the_report_is_three_files(home: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    options = ["--text", home / "text.txt", *WINDOW, "--report", report]
    result = run("compare", home / "most", home / "small", *options)
    assert result.exit_code == 0, result.stderr
    assert sorted(file.name for file in report.iterdir()) == sorted(compare.FILES)
    written = json.loads((report / "comparison.json").read_text())
    table = (report / "comparison.md").read_text()
    assert result.stdout == table == compare.markdown(written)
    for row in written["rows"]:
        assert f"| {row['name']} | {row['sparsity']:.1%} |" in table
        assert f"| {row['perplexity']:.3f} | 3 |" in table
    assert (report / "comparison.png").read_bytes().startswith(b"\x89PNG")
    again = run("compare", home / "most", *options)
    assert again.exit_code == 1
    assert "already holds" in again.stderr


def test_a_cell_that_nobody_measured_is_a_dash() -> None:
    row = {"sparsity": None, "nbytes": 1, "dense_nbytes": 2, "perplexity": 3.0, "windows": 4, "dtype": "float16"}
    one = row | {"name": "one", "tasks": {"piqa": {"acc": 0.5, "acc_stderr": 0.125}}}
    two = row | {"name": "two", "tasks": {}}
    settings = {"text": "t", "window": 8, "device": "cpu", "torch": "2", "limit": None}
    lines = compare.markdown({"settings": settings, "rows": [one, two]}).splitlines()
    assert lines[-2] == "| one | - | 0.0 | 50.0% | 3.000 | 4 | 0.5000 ± 0.1250 |"
    assert lines[-1] == "| two | - | 0.0 | 50.0% | 3.000 | 4 | - |"


def test_folders_of_one_name_are_told_apart(home: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "m").symlink_to(home / ("half" if place == "a" else "most"))
    names = compare._names([home / "half", tmp_path / "x" / "half"])
    assert len(set(names)) == 2
    with pytest.raises(ValueError, match="named twice"):
        compare.compare_folders([home / "half", tmp_path / "a" / "m"], home / "text.txt")
    with pytest.raises(ValueError, match="nothing to compare"):
        compare.compare_folders([], home / "text.txt")


def test_tasks_without_lm_eval_say_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("evaluate", home / "half", "--text", home / "text.txt", *WINDOW, "--tasks", "piqa")
    assert result.exit_code == 1
    assert "pip install 'flash-llm[eval]'" in result.stderr


def test_tasks_are_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library: what it is asked, and what is taken of its answer."""
    asked: dict[str, Any] = {}

    def evaluate(**how: Any) -> Any:
        asked.update(how)
        values = {
            "alias": "piqa",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 1,
            "acc_x_stderr,none": "N/A",
        }
        return {"results": {"piqa": values}}

    manager = SimpleNamespace(match_tasks=lambda names: [name for name in names if name == "piqa"])
    library, interface = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    tasks = ModuleType("lm_eval.tasks")
    library.simple_evaluate = evaluate  # type: ignore[attr-defined]
    interface.HFLM = lambda **how: how  # type: ignore[attr-defined]
    tasks.TaskManager = lambda: manager  # type: ignore[attr-defined]
    modules = {"lm_eval": library, "lm_eval.models.huggingface": interface, "lm_eval.tasks": tasks}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert run_tasks("model", "words", ["piqa"], limit=7) == {"piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 1.0}}
    assert asked["model"] == {"pretrained": "model", "tokenizer": "words", "batch_size": 8}
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["piqa"], 7, None)
    with pytest.raises(ValueError, match="no task 'juggling'"):
        run_tasks("model", "words", ["piqa", "juggling"])
    with pytest.raises(ValueError, match="limit=0"):
        run_tasks("model", "words", ["piqa"], limit=0)
