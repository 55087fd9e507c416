"""What ``flash-llm bench e2e`` asks of vLLM's workers, in their processes: they import these functions by name."""

from __future__ import annotations

import re
from typing import Any

import torch

KINDS = (  # of kernels: the first pattern that is found in the name decides
    ("communication", r"nccl|all_?reduce|cross_device_reduce|all_?gather|multimem"),
    ("attention", r"flash|attn|attention|fmha|reshape_and_cache"),
    ("linear", r"\bspmm|\bunpack|\bsplit_x|gemm|gemv|cutlass|nvjet|machete|marlin|cublas|splitk|xmma|scaled_mm"),
)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensors.values())


def start_profile(worker: Any) -> None:
    """Begins to watch a worker's kernels.

    Raises:
        RuntimeError: no CUDA GPU.
    """
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        raise RuntimeError("--breakdown is of the time of GPU kernels, and there is no CUDA GPU: leave it out")
    worker.flash_llm_profile = profile(activities=[ProfilerActivity.CUDA])
    worker.flash_llm_profile.start()


def stop_profile(worker: Any) -> dict[str, float]:
    """Ends that: microseconds by kind of kernel."""
    torch.cuda.synchronize()
    worker.flash_llm_profile.stop()
    total: dict[str, float] = {}
    for event in worker.flash_llm_profile.key_averages():
        us = event.self_device_time_total
        if us:
            total[kernel_kind(event.key)] = total.get(kernel_kind(event.key), 0.0) + us
    return total


def kernel_kind(name: str) -> str:
    """What a kernel is for, by its name: "linear", "attention", "communication" or "other"."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
