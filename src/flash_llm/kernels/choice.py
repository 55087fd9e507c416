"""Which sparse kernel is taken: the best one for the GPU at hand, or the portable one, to try and time it anywhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash_llm.kernels.plan import Device

VARIABLE = "FLASH_LLM_KERNEL"
AUTO, PORTABLE, PORTABLE_SMALL = "auto", "portable", "portable-99kb"
KERNELS = (AUTO, PORTABLE, PORTABLE_SMALL)
"""auto: the GPU's own kernel if there is one, else the portable one. portable: ``spmm_sm80.cu``, whatever GPU this is.
portable-99kb: the same with no more shared memory than A10, L4, L40S and RTX cards have, that is with their plans."""

_PORTABLE_CAPABILITY = (8, 0)
_SMALL_SHARED_MEMORY = 99 << 10  # bytes a block, of compute capability 8.6, 8.9 and 12.0

_in_use: str | None = None


def kernel() -> str:
    """The one of KERNELS that is in use: :func:`using`'s, else what FLASH_LLM_KERNEL says, else "auto".

    Raises:
        ValueError: the variable says something else.
    """
    return _in_use or of_environment()


@functools.cache
def of_environment() -> str:
    """What the variable says. It is read once: every product asks."""
    return check(os.environ.get(VARIABLE) or AUTO, VARIABLE)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Takes a kernel of KERNELS for all launches of this process until the end of the block, on all its threads.

    CUDA graphs keep the kernels that they were captured with.

    Raises:
        ValueError: no such kernel.
    """
    global _in_use
    before, _in_use = _in_use, check(name)
    try:
        yield
    finally:
        _in_use = before


def seen_as(device: Device, name: str) -> Device:
    """What a plan is to take a GPU for, so that it comes to the kernel ``name``."""
    if name == AUTO:
        return device
    shared = device.shared_memory if name == PORTABLE else min(device.shared_memory, _SMALL_SHARED_MEMORY)
    return replace(device, capability=_PORTABLE_CAPABILITY, shared_memory=shared)


def check(name: str, what: str = "kernel") -> str:
    """The name itself.

    Raises:
        ValueError: it is none of KERNELS; ``what`` names where it stood.
    """
    if name not in KERNELS:
        raise ValueError(f"{what} {name!r}: it takes {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
    return name
