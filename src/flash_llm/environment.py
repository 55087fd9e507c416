"""What this machine is: the versions, GPUs and paths that a bug report needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from flash_llm import __version__
from flash_llm.errors import FlashLLMError
from flash_llm.kernels import choice

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "tokenizers",
    "accelerate",
    "datasets",
    "numpy",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)


def environment() -> dict[str, Any]:
    """Describes this machine; works, and says so, where there is no GPU or a library is missing or broken.

    Returns:
        JSON-ready: ``python``, ``platform``, ``cpu``, ``packages`` (name to version, None where not installed),
        ``cuda`` (what torch was built for, driver, NVRTC), ``gpus`` (a list), ``kernel_cache`` (a folder, or None),
        ``kernel`` (which one is asked for: see ``kernels.choice``).
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "memory_bytes": _memory()},
        "packages": {"flash-llm": __version__, **{name: _version(name) for name in PACKAGES}},
        "cuda": {"torch_built_for": _torch_cuda(), "driver": driver_version(), "nvrtc": _nvrtc()},
        "gpus": _gpus(),
        "kernel_cache": _kernel_cache(),
        "kernel": _kernel(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _torch_cuda() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def _gpus() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "tuned_plans": _tuned_plans(index),
        }
        for index, gpu in enumerate(properties)
    ]


def _tuned_plans(device: int) -> str:
    """How many plans `flash-llm tune` has found for a GPU, and where they are."""
    tuned = importlib.import_module("flash_llm.kernels.tuned")
    file = tuned.path(device)
    try:
        count = len(tuned.read(file))
    except FlashLLMError as error:
        return f"can't be used: {error}"
    return f"{count} in {file}" if count else "none"


def driver_version() -> str | None:
    """The driver's version, as nvidia-smi says it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.split()
    return lines[0] if lines else None


def _nvrtc() -> str | None:
    """The version of the compiler library that would be loaded, or why there is none."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        error, major, minor = nvrtc.nvrtcVersion()
    except ImportError:
        return None
    except Exception as failure:  # a library that is there and can't be loaded: that is what the report is for
        return f"can't be loaded: {' '.join(str(failure).split())}"
    return f"{major}.{minor}" if int(error) == 0 else f"error {int(error)}"


def _kernel_cache() -> str | None:
    try:
        build = importlib.import_module("flash_llm.kernels.build")
    except ImportError:
        return None
    return str(build.cache_dir())


def _kernel() -> str:
    try:
        return choice.kernel()
    except ValueError as error:
        return f"can't be used: {error}"
