"""Loading compiled kernels and launching them on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import torch

from flash_llm.errors import KernelError
from flash_llm.kernels import ahead, build

_PROGRAMMATIC = 1
_thread = threading.local()


@functools.cache
def driver() -> Any:
    """``cuda.bindings.driver``, or a KernelError that says how to get it."""
    build.compiler_version()
    from cuda.bindings import driver as bindings

    return bindings


def check(status: Any, what: str) -> None:
    """Raises KernelError with the driver's own name and words for an error."""
    if int(status) == 0:
        return
    cu = driver()
    name, words = cu.cuGetErrorName(status)[1], cu.cuGetErrorString(status)[1]
    raise KernelError(f"{what} failed: {(name or b'?').decode()} ({(words or b'?').decode()})")


@functools.cache
def architecture(device: int) -> str:
    """The compiler's name of a device's architecture, with the features of that very chip: "sm_90a"."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise KernelError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; kernels need 8.0 or newer"
        )
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def enter(device: int) -> None:
    """Gives the calling thread torch's context for ``device``, its current device, if it has none yet.

    Torch's thread for gradients, for one, has a device as soon as it starts, but no context before its first call of
    the CUDA runtime; and the driver, which launches our kernels, asks for one.
    """
    if getattr(_thread, "entered", False):
        return
    cu = driver()
    status, context = cu.cuCtxGetCurrent()
    check(status, "asking for the thread's context")
    if int(context) == 0:
        status, number = cu.cuDeviceGet(device)
        check(status, f"asking for device {device}")
        status, context = cu.cuDevicePrimaryCtxRetain(number)
        check(status, f"taking the context of device {device}")
        check(cu.cuCtxSetCurrent(context)[0], f"making the context of device {device} the thread's")
    _thread.entered = True


def current_stream(device: int) -> int:
    """Torch's current stream of a device, as the driver takes it, with no object made of it."""
    return torch._C._cuda_getCurrentRawStream(device)


def _config(blocks: int, threads: int, shared: int, overlap: bool) -> tuple[Any, ctypes.Array[ctypes.c_void_p]]:
    """A launch's configuration, but for the stream, and room for the argument's address. Kept by each thread, since
    making them takes as long as a launch."""
    known = _thread.__dict__.setdefault("configs", {})
    found = known.get((blocks, threads, shared, overlap))
    if found is not None:
        return found
    cu = driver()
    config = cu.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    if overlap:
        attribute = cu.CUlaunchAttribute()
        attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = _PROGRAMMATIC
        config.attrs, config.numAttrs = [attribute], 1
    known[blocks, threads, shared, overlap] = config, (ctypes.c_void_p * 1)()
    return known[blocks, threads, shared, overlap]


class Kernel:
    """One compiled kernel, on every device of its architecture. Use :func:`get`."""

    def __init__(self, path: Path, name: str) -> None:
        cu = driver()
        status, self._library = cu.cuLibraryLoadData(path.read_bytes(), [], [], 0, [], [], 0)
        check(status, f"loading {path.name}")
        status, self._kernel = cu.cuLibraryGetKernel(self._library, name.encode())
        check(status, f"finding {name} in {path.name}")
        self._function = cu.CUfunction(init_value=int(self._kernel))
        self._name = name
        self._shared: dict[int, int] = {}

    def launch(
        self, params: ctypes.Structure, blocks: int, threads: int, shared: int, device: int, overlap: bool = False
    ) -> None:
        """Launches on torch's current stream of ``device``.

        Args:
            params: the kernel's one argument.
            shared: bytes of dynamic shared memory.
            overlap: may start before the kernel before it has ended (the kernel itself waits where it must).
        """
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                return self.launch(params, blocks, threads, shared, device, overlap)
        if shared > self._shared.get(device, 0):
            self._allow(shared, device)
        enter(device)
        config, pointers = _config(blocks, threads, shared, overlap)
        config.hStream = current_stream(device)
        pointers[0] = ctypes.addressof(params)
        status = driver().cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0)[0]
        if status:
            check(status, f"launching {self._name} with {blocks} x {threads} threads and {shared} B of shared memory")

    def _allow(self, shared: int, device: int) -> None:
        """Lets the kernel have so much dynamic shared memory."""
        cu = driver()
        attribute = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(cu.cuKernelSetAttribute(attribute, shared, self._kernel, device)[0], f"giving {self._name} {shared} B")
        self._shared[device] = shared


@functools.cache
def get(source: str, name: str, defines: tuple[tuple[str, int], ...], arch: str) -> Kernel:
    """The kernel ``name`` of ``csrc/<source>``, compiled if need be and loaded once a process."""
    return Kernel(ahead.compiled(source, defines, arch), name)
