"""A GPU's clock and power while something is measured on it, as ``nvidia-smi`` tells them.

Large products draw all the power that a GPU may take, and its clock falls until they no longer do: times of the same
kernel then differ by a tenth and more with what ran before. So a time is worth more with the clock beside it.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import datetime

import torch

SAMPLE_MS = 50
_KEPT = 20_000  # samples: a quarter of an hour's
_TIME = "%Y/%m/%d %H:%M:%S.%f"
_QUERY = "timestamp,clocks.sm,power.draw.instant"


class Clocks:
    """Samples of one GPU, from the making of this object to :meth:`close`.

    Without ``nvidia-smi``, or where it says less than it is asked for, there are simply no samples.

    Args:
        device: a CUDA device.
        command: what prints a line ``time, MHz, watts`` for each sample; for tests.
    """

    def __init__(self, device: torch.device, command: Sequence[str] | None = None) -> None:
        self._samples: deque[tuple[datetime, float, float]] = deque(maxlen=_KEPT)
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                command or _command(device),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            return
        lines = self._process.stdout or ()
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True, name="flash-llm-clocks")
        self._reader.start()

    def between(self, begin: datetime, end: datetime) -> dict[str, float]:
        """``sm_mhz`` and ``watts``, medians of the samples between two local times; empty if there are none."""
        found = [(mhz, watts) for time, mhz, watts in list(self._samples) if begin <= time <= end]
        if not found:
            return {}
        clocks, powers = zip(*found, strict=True)
        return {"sm_mhz": statistics.median(clocks), "watts": statistics.median(powers)}

    def close(self) -> None:
        """Ends the sampling."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            time, *numbers = line.strip().split(", ")
            try:
                mhz, watts = map(float, numbers)
                self._samples.append((datetime.strptime(time, _TIME), mhz, watts))
            except ValueError:
                continue  # "[N/A]", or words of warning


def _command(device: torch.device) -> list[str]:
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    which = f"--id=GPU-{uuid}", f"--query-gpu={_QUERY}"
    return ["nvidia-smi", *which, "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"]
