"""Unpacking and multiplying on small odd matrices, checked, for compute-sanitizer to watch:

    python tests/gpu/sanitize.py --compile    # compiles all that is needed, side by side
    compute-sanitizer --tool memcheck --report-api-errors no python tests/gpu/sanitize.py

(and ``--tool racecheck``, ``synccheck``). ``--part 2/4`` takes the second quarter of the cases, so that several
processes can share them. Ends with 1 if a result is wrong. API errors are not reported, since the driver's Python
bindings ask it for functions that it may not have.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

# Every tensor gets its own allocation, so that a step outside of one is seen.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flash_llm
from flash_llm import PackedWeight, ops
from flash_llm.kernels import choice, cuda
from flash_llm.tensor import ValueKind
from gpu_cases import compile_side_by_side, using

SHAPES = ((1, 1), (16, 64), (17, 65), (100, 1000), (576, 1536), (300, 2051))
SPARSITIES = (0.0, 0.5, 0.7, 1.0)
NS = (1, 9, 33, 64, 70, 150, 450)
KERNELS = ((choice.AUTO, False), (choice.AUTO, True), (choice.PORTABLE_SMALL, False))  # and whether 8-bit x is split
CASES = [
    case
    for case in product(KERNELS, SHAPES, SPARSITIES, ValueKind)
    if case[3] is not ValueKind.BITS16 or not case[0][1]
]


def matrix(rows: int, columns: int, sparsity: float, kernel: str) -> torch.Tensor:
    """Whole numbers, so that sums are exact; some lanes have more nonzeros than the others."""
    dtype = (torch.float16, torch.bfloat16)[(rows + len(kernel)) % 2]
    generator = torch.Generator("cuda").manual_seed(rows)
    dense = torch.randint(-4, 5, (rows, columns), device="cuda", generator=generator).to(dtype)
    dense.masked_fill_(torch.rand(rows, columns, device="cuda", generator=generator) < sparsity, 0)
    dense[::5] = 1
    return dense


def packed(dense: torch.Tensor, values: ValueKind) -> PackedWeight:
    """Exactly: 8-bit values hold these whole numbers."""
    scales = None if values is ValueKind.BITS16 else torch.ones(dense.shape[0], device="cuda")
    return PackedWeight.from_dense(dense, values=values, scales=scales)


def wrong(dense: torch.Tensor, weight: PackedWeight) -> int:
    """The number of wrong results on a matrix."""
    rows, columns = dense.shape
    bad = int(not torch.equal(ops.unpack(weight), dense))
    bias = torch.ones(rows, device="cuda", dtype=dense.dtype)
    for n in NS:
        x = torch.randint(-3, 4, (n, columns), device="cuda").to(dense.dtype)
        expected = (x.float() @ dense.float().T + bias.float()).to(dense.dtype)
        bad += int(not torch.equal(flash_llm.linear(x, weight, bias), expected))
    return bad


def part(arguments: list[str]) -> list[tuple]:
    """The cases that this process takes."""
    if "--part" not in arguments:
        return CASES
    this, of = map(int, arguments[arguments.index("--part") + 1].split("/"))
    return CASES[this - 1 :: of]


def compile_all() -> None:
    wanted = set()
    for (kernel, split), (rows, columns), sparsity, values in CASES:
        weight = packed(matrix(rows, columns, sparsity, kernel), values)
        with using(kernel, split):
            wanted |= {found for n in (*NS, 999) for found in cuda.configurations(weight, n)}
    compile_side_by_side(wanted)


def main() -> int:
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        setattr(torch.backends.cuda.matmul, name, False)  # so that torch's own products, of many rows, are exact too
    if "--compile" in sys.argv:
        compile_all()
    bad = 0
    for (kernel, split), (rows, columns), sparsity, values in part(sys.argv):
        dense = matrix(rows, columns, sparsity, kernel)
        with using(kernel, split):
            found = wrong(dense, packed(dense, values))
        bad += found
        what = f"{rows} x {columns}, {sparsity:.0%} zeros, {values.value}"
        print(f"{kernel}{', split' * split}: {what}: {found or 'none'} wrong", flush=True)
    torch.cuda.synchronize()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
