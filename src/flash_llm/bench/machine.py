"""What this GPU attains: bytes read, matrix products and kernel launches a second. ``flash-llm plan`` uses it.

``flash-llm bench machine`` is the command.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_llm.bench import timing
from flash_llm.bench.kernels import environment
from flash_llm.bench.timing import Meter

MATRIX_SIDE = 8192
MATRIX_LAUNCHES = 8
TINY_LAUNCHES = 500
HOW = {
    "read_bandwidth": timing.READ_BANDWIDTH_HOW,
    "matrix_rate": f"torch.mm of float16 [{MATRIX_SIDE}, {MATRIX_SIDE}] matrices with normal random values, median of "
    f"{timing.REPLAYS} replays of a CUDA graph of {MATRIX_LAUNCHES}",
    "launch_us": f"add_ on one float32, a CUDA graph of {TINY_LAUNCHES}, median of {timing.REPLAYS} replays",
}


def measure(meter: Meter, properties: Any, *, command: str = "") -> dict[str, Any]:
    """Measures a GPU.

    Args:
        meter: times, on its own device.
        properties: of the GPU, as ``torch.cuda.get_device_properties`` gives them.
        command: what the user typed, for the report.

    Returns:
        JSON-ready: the fields of :class:`flash_llm.capacity.gpus.Machine`, ``environment``, and ``how`` each figure was
        measured.
    """
    with torch.no_grad():
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "clock": properties.clock_rate * 1e3,
            "read_bandwidth": meter.read_bandwidth(),
            "matrix_rate": matrix_rate(meter),
            "launch_us": launch_us(meter),
            "environment": environment(command, meter.device),
            "how": HOW,
        }


def matrix_rate(meter: Meter) -> float:
    """Floating-point operations a second of a large product in float16. Zeros would draw less power, so not those."""
    generator = torch.Generator(meter.device).manual_seed(0)
    shape = (MATRIX_SIDE, MATRIX_SIDE)
    a, b = (torch.randn(shape, generator=generator, device=meter.device, dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(a)
    us = meter.graph(lambda i: torch.mm(a, b, out=out), MATRIX_LAUNCHES)
    return 2.0 * MATRIX_SIDE**3 / us * 1e6


def launch_us(meter: Meter) -> float:
    """Microseconds from one kernel that does next to nothing to the next, in a graph."""
    one = torch.zeros(1, device=meter.device)
    return meter.graph(lambda i: one.add_(1), TINY_LAUNCHES)
