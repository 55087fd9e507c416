"""Counters in GPU memory by which the blocks of a kernel find out which of them is the last.

They are zero whenever no kernel that uses them runs: each kernel leaves them as it found them. So they are zeroed once,
and must outlive every graph that uses them; they come from the driver and not from torch's allocator, which may be
giving out the memory of a graph that is being captured.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from flash_llm.kernels import launch

_COUNTER_BYTES = 4
_ALIGNMENT = 256  # bytes
_BLOCK_BYTES = 1 << 20  # taken from the driver at a time
_LEAST = 256  # counters, so that growing kernels of a stream seldom need others

_lock = threading.Lock()
_sets: dict[tuple[int, int, int], tuple[int, int]] = {}
_blocks: dict[int, tuple[int, int]] = {}


def arrivals(device: int, count: int) -> int:
    """The address of ``count`` counters for a kernel on torch's current stream of ``device``.

    Each stream has its own, since kernels of different streams run at the same time. A captured graph may be replayed
    beside anything, so each capture has its own too, and keeps them for good: some 1 KB a graph.
    """
    stream = launch.current_stream(device)
    key = (device, stream, _capture_id(stream))
    address, size = _sets.get(key, (0, 0))
    if size >= count:
        return address
    with _lock:
        for old in [k for k in _sets if k[:2] == key[:2] and k[2] not in (0, key[2])]:
            del _sets[old]  # captures that have ended; their graphs go on using the counters
        size = max(count, _LEAST)
        address = _take(device, size * _COUNTER_BYTES)
        _sets[key] = address, size
    return address


def _take(device: int, nbytes: int) -> int:
    nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    free, end = _blocks.get(device, (0, 0))
    if end - free < nbytes:
        size = max(nbytes, _BLOCK_BYTES)
        free = _zeroed(device, size)
        end = free + size
    _blocks[device] = free + nbytes, end
    return free


def _zeroed(device: int, nbytes: int) -> int:
    """Memory of zeros, got on a stream of its own in a way that no capture on any other stream minds."""
    cu = launch.driver()
    with torch.cuda.device(device):
        launch.enter(device)
        mode = _done(cu.cuThreadExchangeStreamCaptureMode(cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
        try:
            address = _done(cu.cuMemAlloc(nbytes))
            stream = _done(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
            _done(cu.cuMemsetD8Async(address, 0, nbytes, stream))
            _done(cu.cuStreamSynchronize(stream))
            _done(cu.cuStreamDestroy(stream))
        finally:
            _done(cu.cuThreadExchangeStreamCaptureMode(mode))
    return int(address)


def _done(result: tuple[Any, ...]) -> Any:
    """The value of a driver call that has succeeded."""
    launch.check(result[0], "getting counters for the kernels")
    return result[1] if len(result) > 1 else None


def _capture_id(stream: int) -> int:
    """The number of the capture that the stream is in, 0 for none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    result = launch.driver().cuStreamGetCaptureInfo(stream)
    launch.check(result[0], "asking for the stream's capture")
    return int(result[2])
