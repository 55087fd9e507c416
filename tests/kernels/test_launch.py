"""Threads and CUDA contexts, with a driver that only counts: which calls are made does not depend on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from flash_llm import KernelError
from flash_llm.kernels import launch


class Driver:
    """Contexts are numbers: 100 + the device's. A thread has none until it is given one."""

    def __init__(self, context: int = 0, status: int = 0) -> None:
        self.context, self.status = context, status
        self.calls: list[str] = []

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        self.calls.append("get")
        return 0, self.context

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return 0, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return self.status, 100 + device

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.context = context
        self.calls.append("set")
        return (0,)

    def cuGetErrorName(self, status: int) -> tuple[int, bytes]:
        return 0, b"CUDA_ERROR_OUT_OF_MEMORY"

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"out of memory"


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """A thread that has made no call yet."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_a_thread_without_a_context_gets_that_of_its_device_once(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr(launch, "driver", lambda: driver)
    for _ in range(3):
        thread.submit(launch.enter, 1).result()
    assert driver.context == 101
    assert driver.calls == ["get", "set"]


def test_a_context_that_is_there_stays(thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(context=7)
    monkeypatch.setattr(launch, "driver", lambda: driver)
    thread.submit(launch.enter, 1).result()
    assert driver.context == 7


def test_a_context_that_cannot_be_had_is_said_in_words(
    thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "driver", lambda: Driver(status=2))
    with pytest.raises(KernelError, match="context of device 1 failed: CUDA_ERROR_OUT_OF_MEMORY"):
        thread.submit(launch.enter, 1).result()


def test_each_thread_has_launch_configurations_of_its_own(thread: ThreadPoolExecutor) -> None:
    """A launch sets the stream on one: another thread's must not be changed meanwhile."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings isn't installed")
    mine, room = launch._config(132, 512, 1024, True)
    again = launch._config(132, 512, 1024, True)
    assert again[0] is mine
    assert again[1] is room
    assert (mine.gridDimX, mine.blockDimX, mine.sharedMemBytes, mine.numAttrs) == (132, 512, 1024, 1)
    assert launch._config(132, 512, 1024, False)[0].numAttrs == 0
    others, its_room = thread.submit(launch._config, 132, 512, 1024, True).result()
    assert others is not mine
    assert its_room is not room
