"""Measuring a machine: the arithmetic on a CPU with a meter that makes its times up, and once on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from flash_llm.bench import machine, timing
from flash_llm.capacity.efficiency import efficiency
from flash_llm.capacity.gpus import read_machine
from flash_llm.cli import app
from flash_llm.errors import KernelError

PROPERTIES = SimpleNamespace(
    name="NVIDIA Test", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, clock_rate=1980000
)


class MadeUpMeter:
    """Every launch takes 2 us."""

    device = torch.device("cpu")
    state: ClassVar[dict[str, float]] = {}

    def read_bandwidth(self) -> float:
        return 3e12

    def graph(self, run: Callable[[int], object], launches: int) -> float:
        run(0)
        return 2.0

    def queued(self, run: Callable[[int], object], launches: int) -> float:
        raise AssertionError("launches that may be captured are measured as graphs")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATRIX_SIDE", 64)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_figures_are_what_the_meter_says(tmp_path: Path) -> None:
    measured = machine.measure(MadeUpMeter(), PROPERTIES, command="flash-llm bench machine")
    assert measured["read_bandwidth"] == 3e12
    assert measured["matrix_rate"] == pytest.approx(2 * 64**3 / 2e-6)
    assert measured["launch_us"] == 2.0
    assert measured["environment"]["command"] == "flash-llm bench machine"
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(measured, allow_nan=False))
    read = read_machine(path)
    assert (read.gpu, read.capability, read.memory, read.clock) == ("NVIDIA Test", "9.0", 80 << 30, 1.98e9)


def test_plan_finds_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "CudaMeter", MadeUpMeter)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    result = run("bench", "machine")
    assert result.exit_code == 0, result.output
    assert "reads 3.00 TB/s" in result.stdout
    assert "NVIDIA Test: 80.0 GiB, reads 3.00 TB/s" in run("plan", "opt-125m").stdout
    published = f"reads {0.864 * efficiency().read_share:.2f} TB/s"
    assert published in run("plan", "opt-125m", "--gpu", "l40s").stdout  # another GPU: not what was measured


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", "machine", "--out", tmp_path / "machine.json")
    assert result.exit_code == 1
    assert "torch finds none here" in result.stderr
    assert not list(tmp_path.iterdir())
    with pytest.raises(KernelError):
        timing.CudaMeter()


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    assert run("bench", "machine", "--out", path).exit_code == 0
    measured = read_machine(path)
    assert measured.gpu == torch.cuda.get_device_name()
    assert 1e10 < measured.read_bandwidth < 2e13
    assert 0.1 < measured.launch_us < 100
