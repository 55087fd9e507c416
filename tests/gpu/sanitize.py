"""Unpacking and multiplying on small odd matrices, checked, for compute-sanitizer to watch:

    python tests/gpu/sanitize.py --compile                      # compiles all that is needed, side by side
    python tests/gpu/sanitize.py --watch racecheck --jobs 5     # all cases under a tool, in five processes

The tools are memcheck, racecheck and synccheck; ``--limit 500`` ends their processes after so many seconds, and
``--logs DIR`` keeps what they print. Without ``--watch`` the cases are run by themselves, and ``--part 2/5`` takes the
second fifth of them. Ends with 1 if a result is wrong, a tool finds an error, or a process doesn't get to its end.

Torch's own products are left out; not by their kernels' names, since racecheck ends with an illegal access when it is
told to leave out a kernel. API errors are not reported, since the driver's Python bindings ask it for functions that it
may not have. Let nothing else run on the GPU meanwhile: a tool needs memory of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
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
    kernels_only = cuda.unpacks_from(0)  # from here on torch multiplies what `unpack` made
    for n in filter(lambda n: n < kernels_only, NS):
        x = torch.randint(-3, 4, (n, columns), device="cuda").to(dense.dtype)
        expected = (x.float() @ dense.float().T + bias.float()).to(dense.dtype)
        bad += int(not torch.equal(flash_llm.linear(x, weight, bias), expected))
    return bad


def part(text: str) -> list[tuple]:
    """The cases of part I of N, as "I/N"."""
    this, of = map(int, text.split("/"))
    return CASES[this - 1 :: of]


def compile_all() -> None:
    wanted = set()
    for (kernel, split), (rows, columns), sparsity, values in CASES:
        weight = packed(matrix(rows, columns, sparsity, kernel), values)
        with using(kernel, split):
            wanted |= {found for n in (*NS, 999) for found in cuda.configurations(weight, n)}
    compile_side_by_side(wanted)


def watched(tool: str, jobs: int, limit: float | None, logs: Path) -> int:
    """Runs all cases under a tool of compute-sanitizer. Returns how many processes found something or did not end."""
    logs.mkdir(parents=True, exist_ok=True)
    begin = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "3"]
    begin += [sys.executable, str(Path(__file__).resolve())]
    end = None if limit is None else time.monotonic() + limit
    running = []
    for i in range(1, jobs + 1):
        log = logs / f"{tool}-{i}-of-{jobs}.log"
        with log.open("wb") as output:
            command = [*begin, "--part", f"{i}/{jobs}"]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        running.append((i, process, log))
    bad = 0
    for i, process, log in running:
        try:
            process.wait(None if end is None else max(0.0, end - time.monotonic()))
            outcome = "clean" if process.returncode == 0 else f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
            outcome = "not done in time"
        bad += outcome != "clean"
        lines = log.read_text(errors="replace").splitlines()
        done = sum(line.endswith("none wrong") for line in lines)
        of = len(part(f"{i}/{jobs}"))
        summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), "no summary")
        print(f"{tool} {i}/{jobs}: {outcome}, {done} of {of} cases right; {summary}", flush=True)
    return bad


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile all kernels first, side by side")
    parser.add_argument("--part", type=part, default=CASES, metavar="I/N", help="of the cases")
    parser.add_argument("--watch", choices=("memcheck", "racecheck", "synccheck"), help="tool to run all cases under")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--limit", type=float, help="seconds after which they are ended")
    parser.add_argument("--logs", type=Path, default=Path("build/sanitizer"), help="folder for what the tool prints")
    return parser.parse_args()


def main() -> int:
    given = options()
    if given.watch:
        return int(watched(given.watch, given.jobs, given.limit, given.logs) > 0)
    if given.compile:
        compile_all()
    bad = 0
    for (kernel, split), (rows, columns), sparsity, values in given.part:
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
