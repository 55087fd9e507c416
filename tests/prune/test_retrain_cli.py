"""``flash-llm retrain`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flash_llm.cli import app
from flash_llm.prune import prune_folder

Make = Callable[..., Path]
SMALL = ["--batch", 4, "--seqlen", 32, "--validation", 2, "--lr", 0.01]


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def pruned(make_model: Make, tmp_path: Path) -> Path:
    prune_folder(make_model("llama"), tmp_path / "pruned", "magnitude", 0.5, progress=False)
    return tmp_path / "pruned"


def test_it_prunes_further_and_prints_the_folder(pruned: Path, text: Path, tmp_path: Path) -> None:
    how = ["--sparsity", 0.8, "--score", "taylor", "--scope", "global", "--teacher", pruned, "--distill", 0.7]
    result = run("retrain", pruned, "--text", text, "--steps", 10, *SMALL, *how, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n"), result.stderr
    assert "10 steps" in result.stderr
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["zeros"] / record["weights"] == pytest.approx(0.8, abs=1e-3)
    done = record["retraining"][0]
    assert (done["score"], done["scope"], done["distill"], done["lr"]) == ("taylor", "global", 0.7, 0.01)
    assert run("compress", tmp_path / "out", "--out", tmp_path / "packed", "--min-sparsity", 0).exit_code == 0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (["--steps", 1, "--epochs", 1], "one of steps, epochs and minutes"),
        (["--steps", 1, "--teacher", "nobody"], "nobody does not exist"),
        (["--steps", 1, "--device", "toaster"], "toaster"),
        (["--steps", 1, "--dense"], "is pruned"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(how: list[object], words: str, pruned: Path, text: Path) -> None:
    out = pruned.parent / "out"
    before = sorted(pruned.parent.iterdir())
    result = run("retrain", pruned, "--text", text, *SMALL, *how, "--out", out)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert sorted(pruned.parent.iterdir()) == before
