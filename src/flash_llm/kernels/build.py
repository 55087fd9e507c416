"""Kernels compiled at run time for the GPU at hand, and kept on disk.

NVRTC, through ``cuda.core``, is all it takes: no CUDA toolkit, no headers. A binary's name in the cache is a hash of
the sources, the options, the architecture and the compiler's version; it is written under a temporary name and renamed,
so that racing processes never see half a file.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
from importlib import resources
from pathlib import Path
from typing import Any

from flash_llm.errors import KernelError
from flash_llm.files import write_whole

_MISSING = (
    "GPU kernels are compiled when they are first used, and {what} is needed for that but can't be imported ({error}). "
    "Install it with: pip install 'flash-llm[cuda]'"
)
_importing = threading.Lock()


def cache_dir() -> Path:
    """Where compiled kernels are kept: FLASH_LLM_CACHE_DIR, else flash-llm/kernels in the user's cache folder."""
    if chosen := os.environ.get("FLASH_LLM_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flash-llm" / "kernels"


def source_dir() -> Path:
    """The folder of the kernels' sources."""
    return Path(str(resources.files("flash_llm.kernels") / "csrc"))


def compile_kernel(source: str, defines: tuple[tuple[str, int], ...], arch: str) -> Path:
    """Compiles ``csrc/<source>`` for an architecture such as "sm_90a", unless the cache has it. Needs no GPU.

    Returns:
        The binary's path in the cache.

    Raises:
        KernelError: no compiler, or it refuses the source.
    """
    path = cache_dir() / f"{Path(source).stem}-{arch}-{_digest(source, defines, arch)}.cubin"
    if not path.exists():
        _keep(path, compile_cubin(source, defines, arch)[0])
    return path


def compile_cubin(source: str, defines: tuple[tuple[str, int], ...], arch: str) -> tuple[bytes, str]:
    """The binary of ``csrc/<source>``, and what the compiler said, with each kernel's registers, spills and stack."""
    program_type, options_type = compiler()
    options = options_type(
        arch=arch,
        std="c++17",
        define_macro=[(name, str(value)) for name, value in defines],
        include_path=[str(source_dir())],
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    try:
        program = program_type((source_dir() / source).read_text(), "c++", options)
        binary = program.compile("cubin", logs=log)
    except Exception as error:
        raise KernelError(
            f"{source} can't be compiled for {arch} with {dict(defines)}: {error}\n{log.getvalue()}"
        ) from error
    return bytes(binary.code), log.getvalue()


@functools.cache
def compiler_version() -> str:
    """NVRTC's version, such as "13.0"."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(_MISSING.format(what="cuda-bindings", error=error)) from error
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the library itself can't be found
        raise KernelError(_MISSING.format(what="NVRTC", error=error)) from error
    if int(status):
        raise KernelError(f"NVRTC doesn't answer: {status}; reinstall nvidia-cuda-nvrtc")
    return f"{major}.{minor}"


@functools.cache
def compiler() -> tuple[Any, Any]:
    """``cuda.core``'s Program and ProgramOptions, or a KernelError that says how to get them."""
    compiler_version()
    with _importing:  # kernels are compiled in several threads, and importing cuda.core in several at once may fail
        try:
            from cuda.core import Program, ProgramOptions
        except ImportError:
            try:
                from cuda.core.experimental import Program, ProgramOptions
            except ImportError as error:
                raise KernelError(_MISSING.format(what="cuda-core", error=error)) from error
    return Program, ProgramOptions


@functools.cache
def _digest(source: str, defines: tuple[tuple[str, int], ...], arch: str) -> str:
    digest = hashlib.sha256(repr((source, defines, arch, compiler_version())).encode())
    for path in sorted(source_dir().glob("*.cu*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _keep(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise KernelError(
            f"compiled kernels can't be kept in {path.parent}: {error}. Set FLASH_LLM_CACHE_DIR to a folder that can "
            f"be written to"
        ) from error
