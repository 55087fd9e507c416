"""Time and bandwidth on a GPU, measured so that neither the host nor the L2 cache gets into the figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Protocol

import torch

from flash_llm.errors import KernelError

ROTATED_BYTES = 400_000_000
"""Bytes of weights gone through in turn: several times any L2 cache."""

MAX_COPIES = 1024
"""Copies of one weight at most, so that tiny weights don't make graphs of a million launches."""

LAUNCHES = 8
REPLAYS = 15
READ_BANDWIDTH_HOW = "torch.sum of 4 GiB of float32 (half of the free memory, if that is less), the best of ten"
_WARM_UPS = 3
_QUEUED_REPLAYS = 5
_READ_BYTES = 4 << 30
_HEAD_START_BYTES = 1 << 30


class Meter(Protocol):
    """How a benchmark asks for time: :class:`CudaMeter`, or what a test puts in its place."""

    device: torch.device

    def read_bandwidth(self) -> float:
        """Bytes a second that the device reads from its memory."""

    def graph(self, run: Callable[[int], object], launches: int) -> float:
        """Median microseconds of one of ``launches`` launches, run(0), run(1), ..., as a CUDA graph."""

    def queued(self, run: Callable[[int], object], launches: int) -> float:
        """The same for what may not be captured in a graph."""


class CudaMeter:
    """Measures on torch's current CUDA device.

    Raises:
        KernelError: there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise KernelError(
                "kernels are measured on a CUDA GPU, and torch finds none here; "
                "run this where `flash-llm env` lists one"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._head_start: torch.Tensor | None = None

    def read_bandwidth(self) -> float:
        """Bytes a second, as ``READ_BANDWIDTH_HOW`` says."""
        nbytes = min(_READ_BYTES, torch.cuda.mem_get_info(self.device)[0] // 2)
        data = torch.ones(nbytes // 4, device=self.device)
        milliseconds = [_elapsed(data.sum) for _ in range(11)][1:]
        return data.nbytes / (min(milliseconds) * 1e-3)

    def graph(self, run: Callable[[int], object], launches: int) -> float:
        """Launches captured once and replayed, so that the host's own time doesn't show."""
        run(0)  # what is compiled, loaded or chosen at the first call must not be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(launches):
                run(i)
        times = [_elapsed(graph.replay) for _ in range(_WARM_UPS + REPLAYS)]
        return statistics.median(times[_WARM_UPS:]) / launches * 1e3

    def queued(self, run: Callable[[int], object], launches: int) -> float:
        """Launches queued behind a write of 1 GiB, which keeps the device busy while the host gets ahead."""
        if self._head_start is None:
            self._head_start = torch.empty(_HEAD_START_BYTES, dtype=torch.uint8, device=self.device)

        def all_launches() -> None:
            for i in range(launches):
                run(i)

        times = [_elapsed(all_launches, before=self._head_start.zero_) for _ in range(1 + _QUEUED_REPLAYS)]
        return statistics.median(times[1:]) / launches * 1e3


def _elapsed(run: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Milliseconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copies(nbytes: int) -> int:
    """How many copies of a weight of ``nbytes`` are gone through in turn: 400 MB of them, at least 2."""
    return min(MAX_COPIES, max(2, -(-ROTATED_BYTES // nbytes)))


def launches(count: int) -> int:
    """Launches timed together, so that each of ``count`` copies has its turn."""
    return max(LAUNCHES, count)
