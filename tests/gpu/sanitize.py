"""Unpacking and multiplying on small odd matrices, checked, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

(and ``--tool racecheck``, ``synccheck``, ``initcheck``). Ends with 1 if a result is wrong.
"""

from __future__ import annotations

import os
import sys

# Every tensor gets its own allocation, so that a step outside of one is seen.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

import flash_llm
from flash_llm import PackedWeight, ops
from flash_llm.kernels import cuda, plan

SHAPES = ((1, 1), (16, 64), (17, 65), (100, 1000), (576, 1536), (300, 2051))
SPARSITIES = (0.0, 0.5, 0.7, 1.0)
NS = (1, 9, 33, 64, 70)


def wrong(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> int:
    """The number of wrong results on a matrix."""
    dense = torch.randint(-4, 5, (rows, columns), device="cuda").to(dtype)
    dense.masked_fill_(torch.rand(rows, columns, device="cuda") < sparsity, 0)
    dense[::5] = 1  # some lanes have more than the others
    weight = PackedWeight.from_dense(dense)
    bad = int(not torch.equal(ops.unpack(weight), dense))
    bias = torch.ones(rows, device="cuda", dtype=dtype)
    for n in NS:
        x = torch.randint(-3, 4, (n, columns), device="cuda").to(dtype)
        expected = (x.float() @ dense.float().T + bias.float()).to(dtype)
        bad += int(not torch.equal(flash_llm.linear(x, weight, bias), expected))
    return bad


def main() -> int:
    real = cuda.device_properties(0)
    bad = 0
    for number, device in enumerate((real, plan.Device((8, 0), real.multiprocessors, 101376))):
        cuda.device_properties = lambda _, device=device: device  # type: ignore[assignment]
        cuda.spmm_plan_cached.cache_clear()
        for rows, columns in SHAPES:
            for sparsity in SPARSITIES:
                dtype = (torch.float16, torch.bfloat16)[(rows + number) % 2]
                found = wrong(rows, columns, sparsity, dtype)
                bad += found
                kernel = "the GPU's own kernel" if number == 0 else "the kernel for every GPU"
                print(f"{kernel}: {rows} x {columns}, {sparsity:.0%} zeros, {dtype}: {found or 'none'} wrong")
    torch.cuda.synchronize()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
