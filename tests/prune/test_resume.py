"""A run that was cut off goes on, and ends as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flash_llm.cli import app
from flash_llm.errors import CheckpointError
from flash_llm.prune import CalibrationConfig, job, prune_folder
from flash_llm.prune.job import Job

Make = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fail_after(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Job.finish

    def cut(self: Job, index: int, *args: Any) -> None:
        finish(self, index, *args)
        if index == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "finish", cut)


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("method", ["wanda", "magnitude", "alps"])
def test_going_on_equals_never_having_stopped(
    stage: int, method: str, make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama", num_hidden_layers=4)
    calibration = CalibrationConfig(str(text), samples=4, seqlen=16)
    arguments: dict[str, Any] = {"calibration": calibration, "include_lm_head": True, "progress": False}
    whole = prune_folder(source, tmp_path / "whole", method, 0.5, **arguments)
    with monkeypatch.context() as patch:
        fail_after(stage, patch)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, tmp_path / "cut", method, 0.5, **arguments)
    assert not (tmp_path / "cut").exists()
    report = prune_folder(source, tmp_path / "cut", method, 0.5, **arguments)
    assert report.resumed_stages == stage + 1
    assert report.layers == whole.layers
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert not (tmp_path / ".cut.partial").exists()


def test_quick_blocks_with_much_to_write_are_kept_together(
    make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every block's hidden states are written then, and a run goes on from the last that were."""
    source = make_model("llama", num_hidden_layers=5)
    arguments: dict[str, Any] = {"calibration": CalibrationConfig(str(text), samples=4, seqlen=16), "progress": False}
    whole = prune_folder(source, tmp_path / "whole", "wanda", 0.5, **arguments)
    write = job.write_tensors

    def slow(path: Path, tensors: dict[str, Any]) -> None:
        write(path, tensors)
        time.sleep(0.35)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_tensors", slow)
        fail_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, tmp_path / "cut", "wanda", 0.5, **arguments)
    assert prune_folder(source, tmp_path / "cut", "wanda", 0.5, **arguments).resumed_stages == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert whole.resumed_stages == 0


def test_a_killed_process_is_taken_up(make_model: Make, text: Path, tmp_path: Path) -> None:
    """SIGKILL at whatever point it is when two blocks are done."""
    source = make_model("llama", num_hidden_layers=8)
    script = (
        "import sys, time; from flash_llm.prune import *; from flash_llm.prune.job import Job; finish = Job.finish\n"
        "def slow(*args): finish(*args); time.sleep(0.3)\n"
        "Job.finish = slow\n"
        "prune_folder(sys.argv[1], sys.argv[2], calibration=CalibrationConfig(sys.argv[3], 4, 16))"
    )
    # One thread, as in these tests: the order of sums depends on their number.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, source, tmp_path / "cut", text], env=environment)
    started = Job(tmp_path / "cut", {})
    while len(started.records()) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()

    calibration = CalibrationConfig(str(text), 4, 16)
    assert prune_folder(source, tmp_path / "cut", calibration=calibration).resumed_stages >= 2
    prune_folder(source, tmp_path / "whole", calibration=calibration)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_cut_before_the_last_rename_is_taken_up(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "deliver", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, tmp_path / "out", "magnitude", progress=False)
    assert prune_folder(source, tmp_path / "out", "magnitude", progress=False).resumed_stages == 3


def test_what_a_delivered_job_left_behind_is_not_taken_up(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the rename and the removal of the working folder; then the output was removed."""
    source, out = make_model("llama"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("flash_llm.prune.job.shutil.rmtree", lambda folder: None)
        prune_folder(source, out, "magnitude", progress=False)
    out.rename(tmp_path / "elsewhere")
    prune_folder(source, out, "magnitude", progress=False)
    assert contents(out) == contents(tmp_path / "elsewhere")


def test_another_job_is_not_mixed_in(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_after(0, patch)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, out, "magnitude", 0.5, progress=False)
    with pytest.raises(FileExistsError, match=r"sparsity: 0\.5 then, 0\.6 now.*resume=False"):
        prune_folder(source, out, "magnitude", 0.6, progress=False)
    report = prune_folder(source, out, "magnitude", 0.6, resume=False, progress=False)
    assert report.resumed_stages == 0
    assert report.zeros / report.weights == pytest.approx(0.6, abs=1e-3)


def test_the_command_line_says_its_own_way_out(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["prune", str(make_model("llama")), "--method", "magnitude", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        fail_after(0, patch)
        CliRunner().invoke(app, arguments)
    refused = CliRunner().invoke(app, [*arguments, "--sparsity", "0.6"])
    assert refused.exit_code == 1
    assert "discard it with --restart." in refused.output
    assert CliRunner().invoke(app, [*arguments, "--sparsity", "0.6", "--restart"]).exit_code == 0


def test_a_job_that_finished_nothing_is_not_in_the_way(
    make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that failed nor one that was killed."""
    source, out = make_model("llama"), tmp_path / "out"
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    with monkeypatch.context() as patch:
        patch.setattr("flash_llm.prune.folder.Walk", lambda *args: (_ for _ in ()).throw(CheckpointError("no walk")))
        with pytest.raises(CheckpointError, match="no walk"):
            prune_folder(source, out, "wanda", calibration=calibration, progress=False)
        assert not (tmp_path / ".out.partial").exists()
        patch.setattr("flash_llm.prune.job.shutil.rmtree", lambda folder: None)
        with pytest.raises(CheckpointError, match="no walk"):
            prune_folder(source, out, "wanda", calibration=calibration, progress=False)
    assert (tmp_path / ".out.partial").exists()
    prune_folder(source, out, "magnitude", progress=False)


def test_a_model_that_changed_meanwhile_is_noticed(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_after(0, patch)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(source, out, "magnitude", progress=False)
    (source / "config.json").touch()
    with pytest.raises(FileExistsError, match="model: "):
        prune_folder(source, out, "magnitude", progress=False)


def test_two_processes_do_not_share_a_folder(make_model: Make, tmp_path: Path) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    with Job(out, {}).started(resume=True), pytest.raises(FileExistsError, match="Another process"):
        prune_folder(source, out, "magnitude", progress=False)
