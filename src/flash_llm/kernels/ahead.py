"""Kernels compiled in the background, side by side, while weights are still loading: the first launch need not wait.

The compiler works outside of Python, so threads will do. A model of a few shapes takes some thirty kernels of half a
second each, which would else be compiled one after the other when each is first launched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from flash_llm.kernels import build

if TYPE_CHECKING:
    from flash_llm.tensor import PackedWeight

Configuration = tuple[str, tuple[tuple[str, int], ...], str]
"""Arguments of ``build.compile_kernel``: source, defines, architecture."""

ROWS_OF_X = (8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 8192)
"""Numbers of rows of x that between them take every kernel of a weight, or nearly so."""

_running: dict[Configuration, Future[Path]] = {}


def begin_weight(weight: PackedWeight, ns: Iterable[int] = ROWS_OF_X) -> list[Future[Path]]:
    """Begins to compile what a weight on a GPU takes for the numbers ``ns`` of rows of x; see :func:`begin`."""
    from flash_llm.kernels import cuda

    return begin({found for n in ns for found in cuda.configurations(weight, n)})


def begin(configurations: Iterable[Configuration]) -> list[Future[Path]]:
    """Begins to compile what the cache lacks and nobody has begun.

    Returns:
        What to wait for, if one wants to. An error is met again where the kernel is launched: see :func:`compiled`.

    Raises:
        KernelError: there is no compiler.
    """
    build.compiler()  # here, since its modules can't be imported by two threads at once
    wanted = list(configurations)
    for configuration in wanted:
        if configuration not in _running:
            _running[configuration] = _threads().submit(build.compile_kernel, *configuration)
    return [_running[configuration] for configuration in wanted]


def compiled(source: str, defines: tuple[tuple[str, int], ...], arch: str) -> Path:
    """The path of a kernel's binary: one that is under way is waited for, another is compiled here and now.

    Raises:
        KernelError: as ``build.compile_kernel``.
    """
    under_way = _running.pop((source, defines, arch), None)
    return build.compile_kernel(source, defines, arch) if under_way is None else under_way.result()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="flash-llm-compile")
