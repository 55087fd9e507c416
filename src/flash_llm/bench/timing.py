"""Time and bandwidth on a GPU, measured so that neither the host nor the L2 cache gets into the figures."""

from __future__ import annotations

import atexit
import statistics
from collections.abc import Callable
from datetime import datetime
from typing import Protocol, TypeVar

import torch

from flash_llm.bench.clocks import Clocks
from flash_llm.errors import KernelError

ROTATED_BYTES = 400_000_000
"""Bytes of weights gone through in turn: several times any L2 cache."""

MAX_COPIES = 1024
"""Copies of one weight at most, so that tiny weights don't make graphs of a million launches."""

LAUNCHES = 32
"""Launches in a graph at least: starting and ending a replay takes some microseconds, and a model's graph is long."""

REPLAYS = 15
CASE_SECONDS = 0.2
"""About the most that one case is timed for: products of thousands of rows take milliseconds each, and need few."""
READ_BANDWIDTH_HOW = "torch.sum of 4 GiB of float32 (half of the free memory, if that is less), the best of ten"
_WARM_UPS = 3
_QUEUED_WARM_UPS = 1
_QUEUED_REPLAYS = 5
_LEAST_REPLAYS = 3
_READ_BYTES = 4 << 30
_HEAD_START_BYTES = 1 << 30


class Meter(Protocol):
    """How a benchmark asks for time: :class:`CudaMeter`, or what a test puts in its place."""

    device: torch.device
    state: dict[str, float]
    """``sm_mhz`` and ``watts`` of the device during the last graph, where known: see ``bench.clocks``."""

    def read_bandwidth(self) -> float:
        """Bytes a second that the device reads from its memory."""

    def graph(self, run: Callable[[int], object], launches: int) -> float:
        """Median microseconds of one of ``launches`` launches, run(0), run(1), ..., as a CUDA graph.

        Fewer launches and replays are timed where so many would take longer than ``CASE_SECONDS``. What ``run`` returns
        takes the same place in memory every time: only what ``run`` itself chooses by its number is rotated.
        """

    def queued(self, run: Callable[[int], object], launches: int) -> float:
        """The same for what may not be captured in a graph."""


class CudaMeter:
    """Measures on torch's current CUDA device.

    Args:
        clocks: also sample its clock and power.

    Raises:
        KernelError: there is none.
    """

    def __init__(self, clocks: bool = False) -> None:
        if not torch.cuda.is_available():
            raise KernelError(
                "kernels are measured on a CUDA GPU, and torch finds none here; "
                "run this where `flash-llm env` lists one"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.state: dict[str, float] = {}
        self._head_start: torch.Tensor | None = None
        self._clocks = Clocks(self.device) if clocks else None
        if self._clocks is not None:
            atexit.register(self._clocks.close)

    def read_bandwidth(self) -> float:
        """Bytes a second, as ``READ_BANDWIDTH_HOW`` says."""
        nbytes = min(_READ_BYTES, torch.cuda.mem_get_info(self.device)[0] // 2)
        data = torch.ones(nbytes // 4, device=self.device)
        milliseconds = [_elapsed(data.sum) for _ in range(11)][1:]
        return data.nbytes / (min(milliseconds) * 1e-3)

    def graph(self, run: Callable[[int], object], launches: int) -> float:
        """Launches captured once and replayed, so that the host's own time doesn't show."""
        run(0)  # what is compiled, loaded or chosen at the first call must not be captured
        graph = _captured(run, launches)
        count, replays = fitting(launches, _elapsed(graph.replay) * 1e-3)
        if count < launches:
            graph.reset()
            graph = _captured(run, count)
        begin = datetime.now()
        times = [_elapsed(graph.replay) for _ in range(_WARM_UPS + replays)]
        self.state = self._clocks.between(begin, datetime.now()) if self._clocks is not None else {}
        return statistics.median(times[_WARM_UPS:]) / count * 1e3

    def queued(self, run: Callable[[int], object], launches: int) -> float:
        """Launches queued behind a write of 1 GiB, which keeps the device busy while the host gets ahead."""
        if self._head_start is None:
            self._head_start = torch.empty(_HEAD_START_BYTES, dtype=torch.uint8, device=self.device)
        before = self._head_start.zero_
        run(0)  # as above
        one = _elapsed(lambda: run(0), before) * 1e-3
        count, replays = fitting(launches, launches * one, _QUEUED_WARM_UPS, _QUEUED_REPLAYS)

        def all_launches() -> None:
            for i in range(count):
                run(i)

        times = [_elapsed(all_launches, before) for _ in range(_QUEUED_WARM_UPS + replays)]
        return statistics.median(times[_QUEUED_WARM_UPS:]) / count * 1e3


def _captured(run: Callable[[int], object], launches: int) -> torch.cuda.CUDAGraph:
    """The graph of run(0), run(1), ..."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    return graph


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


class Sized(Protocol):
    """What has a size in bytes: a tensor, a packed weight."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


def rotated(first: T, another: Callable[[], T]) -> list[T]:
    """``first`` and as many others as are gone through in turn with it, each made by ``another()``."""
    return [first, *(another() for _ in range(copies(first.nbytes) - 1))]


def launches(count: int) -> int:
    """Launches timed together, so that each of ``count`` copies has its turn."""
    return max(LAUNCHES, count)


def fitting(launches: int, seconds: float, warm_ups: int = _WARM_UPS, replays: int = REPLAYS) -> tuple[int, int]:
    """(launches, replays) that take about ``CASE_SECONDS`` with the warm-ups, and no more than were asked for.

    Launches go first, down to one: what takes that long is not kept by any cache from one launch to the next. Then
    replays, down to three.

    Args:
        launches: that are to be timed together.
        seconds: that they take together.
        warm_ups, replays: of all launches; the first ones are not counted.
    """
    a_replay, one = CASE_SECONDS / (warm_ups + replays), seconds / launches
    if seconds <= a_replay:
        return launches, replays
    count = max(1, int(a_replay / one))
    if one <= a_replay:
        return count, replays
    return count, min(replays, max(_LEAST_REPLAYS, int(CASE_SECONDS / one) - warm_ups))
