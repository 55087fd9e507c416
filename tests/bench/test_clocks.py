"""Samples of a GPU's clock and power: medians of a span of time, and none where nothing tells."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

import pytest
import torch

from flash_llm.bench.clocks import Clocks, _command
from flash_llm.bench.timing import CudaMeter

DEVICE = torch.device("cpu")
SAMPLES = """2026/11/26 10:00:00.000, 1980, 300.00
2026/11/26 10:00:01.000, 1600, 700.10
Warning: something
2026/11/26 10:00:02.000, [N/A], [N/A]
2026/11/26 10:00:02.000, 1700, 690.10
2026/11/26 10:00:03.000, 1650, 700.00"""
FIRST = datetime(2026, 11, 26, 10)


@contextmanager
def sampled(text: str) -> Iterator[Clocks]:
    clocks = Clocks(DEVICE, [sys.executable, "-c", f"print({text!r})"])
    try:
        clocks._reader.join(20)
        yield clocks
    finally:
        clocks.close()


def test_medians_of_a_span_of_time() -> None:
    with sampled(SAMPLES) as clocks:
        span = FIRST + timedelta(seconds=0.5), FIRST + timedelta(seconds=9)
        assert clocks.between(*span) == {"sm_mhz": 1650.0, "watts": 700.0}
        assert clocks.between(FIRST, FIRST) == {"sm_mhz": 1980.0, "watts": 300.0}
        assert clocks.between(FIRST + timedelta(days=1), FIRST + timedelta(days=2)) == {}


def test_a_program_that_says_nothing_of_use() -> None:
    with sampled("No devices were found") as clocks:
        assert clocks.between(datetime.min, datetime.max) == {}


def test_no_such_program() -> None:
    clocks = Clocks(DEVICE, ["/no/such/program"])
    assert clocks.between(datetime.min, datetime.max) == {}
    clocks.close()


def test_sampling_ends() -> None:
    clocks = Clocks(DEVICE, [sys.executable, "-c", "import time; time.sleep(600)"])
    clocks.close()
    assert clocks._process is not None
    assert clocks._process.returncode is not None
    assert not clocks._reader.is_alive()


@pytest.mark.gpu
def test_a_real_gpus_clock() -> None:
    assert any("GPU-" in word for word in _command(torch.device("cuda", 0)))
    meter = CudaMeter(clocks=True)
    time.sleep(1)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    meter.graph(lambda i: x @ x, 64)
    assert 200 < meter.state["sm_mhz"] < 4000
    assert 20 < meter.state["watts"] < 3000
