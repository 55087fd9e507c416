"""How fast the sparse kernel is beside the best dense product, in one run.

    python -m flash_llm.bench.kernels --shapes paper --out kernels.json

Times are medians of replays of CUDA graphs whose launches go through copies of the weight, at least 400 MB of them, so
that the L2 cache doesn't help either side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_llm import ops
from flash_llm.bench.shapes import parse_shapes
from flash_llm.tensor import PackedWeight

_ROTATED_BYTES = 400e6
_LAUNCHES, _REPLAYS = 8, 15


def microseconds(run: Callable[[int], object], launches: int) -> float:
    """Median time of one of ``launches`` launches, run(0), run(1), ..., captured in a CUDA graph."""
    run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    times = []
    for _ in range(3 + _REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches * 1e3)
    return statistics.median(times[3:])


def read_bandwidth() -> float:
    """Bytes a second that this GPU reads, from summing 4 GB of float32: the best of ten."""
    data = torch.ones(1 << 30, device="cuda")
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return data.nbytes / min(times[1:])


def copies(nbytes: int) -> int:
    """How many copies of a weight are rotated through."""
    return max(2, -(-int(_ROTATED_BYTES) // nbytes))


def dense_microseconds(shape: tuple[int, int], xs: dict[int, Tensor]) -> dict[int, float]:
    """The best of F.linear and torch.mm(W, X^T), for every number of rows of x."""
    count = copies(shape[0] * shape[1] * 2)
    weights = [torch.randn(shape, device="cuda", dtype=xs[min(xs)].dtype) for _ in range(count)]
    launches = max(_LAUNCHES, count)

    def best(x: Tensor) -> float:
        return min(
            microseconds(lambda i: torch.nn.functional.linear(x, weights[i % count]), launches),
            microseconds(lambda i: torch.mm(weights[i % count], x.t()), launches),
        )

    return {n: best(x) for n, x in xs.items()}


def sparse_microseconds(x: Tensor, weights: list[PackedWeight]) -> float:
    """Median time of x times one of ``weights``, which are gone through in turn."""
    return microseconds(lambda i: ops.linear(x, weights[i % len(weights)]), max(_LAUNCHES, len(weights)))


def _clone(weight: PackedWeight) -> PackedWeight:
    bitmap, values, offsets = (tensor.clone() for tensor in weight.tensors().values())
    return replace(weight, bitmap=bitmap, values=values, offsets=offsets)


def measure(
    shape: tuple[int, int], sparsities: list[float], ns: list[int], dtype: torch.dtype, bandwidth: float
) -> list[dict[str, Any]]:
    """A row for every sparsity and n."""
    rows, columns = shape
    torch.manual_seed(0)
    xs = {n: torch.randn(n, columns, device="cuda", dtype=dtype) for n in ns}
    dense_us = dense_microseconds(shape, xs)
    results = []
    for sparsity in sparsities:
        weight = torch.randn(shape, device="cuda", dtype=dtype)
        weight[torch.rand(shape, device="cuda", dtype=torch.float16) < sparsity] = 0
        packed = PackedWeight.from_dense(weight)
        wide = weight.float().t()
        clones = [_clone(packed) for _ in range(copies(packed.nbytes))]
        for n, x in xs.items():
            expected = x.float() @ wide
            error = float((ops.linear(x, packed).float() - expected).norm() / expected.norm())
            us = sparse_microseconds(x, clones)
            moved = packed.nbytes + 2 * n * (rows + columns)
            results.append(
                {
                    "rows": rows,
                    "columns": columns,
                    "sparsity": sparsity,
                    "n": n,
                    "us": us,
                    "dense_us": dense_us[n],
                    "speedup": dense_us[n] / us,
                    "gigabytes_a_second": moved / us * 1e-3,
                    "bandwidth_share": moved / us * 1e6 / bandwidth,
                    "bytes_an_element": packed.nbytes / (rows * columns),
                    "relative_error": error,
                    "tile_words": packed.tile_words,
                }
            )
    return results


def means(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the shapes, for every sparsity and n."""
    keys = sorted({(row["sparsity"], row["n"]) for row in results})
    table = []
    for sparsity, n in keys:
        of_key = [row for row in results if (row["sparsity"], row["n"]) == (sparsity, n)]
        columns = ("speedup", "bandwidth_share")
        mean = {name: statistics.geometric_mean(row[name] for row in of_key) for name in columns}
        table.append({"sparsity": sparsity, "n": n, "shapes": len(of_key), **mean})
    return table


def environment() -> dict[str, Any]:
    """The GPU and the versions that figures depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "command": "python -m flash_llm.bench.kernels " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(report: dict[str, Any]) -> str:
    """The means and the single cases of a report as two tables."""
    table, results = report["means"], report["results"]
    sparsities = sorted({row["sparsity"] for row in table})
    head = "| {} | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |\n|---|" + "---|" * len(sparsities) + "\n"

    def lines(label: str, rows: list[dict[str, Any]]) -> str:
        cells = {row["sparsity"]: f"{row['speedup']:.2f} ({row['bandwidth_share']:.0%})" for row in rows}
        return f"| {label} | " + " | ".join(cells.get(s, "-") for s in sparsities) + " |\n"

    text = head.format("geometric mean")
    for n in sorted({row["n"] for row in table}):
        text += lines(f"N = {n}", [row for row in table if row["n"] == n])
    text += "\n" + head.format("rows x columns, N")
    for rows, columns, n in sorted({(r["rows"], r["columns"], r["n"]) for r in results}):
        of_case = [r for r in results if (r["rows"], r["columns"], r["n"]) == (rows, columns, n)]
        text += lines(f"{rows}x{columns}, {n}", of_case)
    return text


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes the whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flash_llm.bench.kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--shapes", default="paper", help="a name of flash_llm.bench.shapes, or 4096x4096,...")
    parser.add_argument("--sparsity", default="0.5,0.6,0.7,0.8,0.9")
    parser.add_argument("--n", default="8,16,32,64", help="rows of x")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; stops before the next shape")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "kernels are measured on a CUDA GPU, and torch finds none here\n")
    begin = time.monotonic()
    bandwidth = read_bandwidth()
    report: dict[str, Any] = {"environment": environment(), "read_bandwidth": bandwidth, "not_measured": []}
    results: list[dict[str, Any]] = []
    for shape in parse_shapes(arguments.shapes):
        if time.monotonic() - begin > arguments.time_limit:
            report["not_measured"].append(shape)
            continue
        sparsities = [float(s) for s in arguments.sparsity.split(",")]
        ns = [int(n) for n in arguments.n.split(",")]
        results += measure(shape, sparsities, ns, getattr(torch, arguments.dtype), bandwidth)
        torch.cuda.empty_cache()
    report |= {"means": means(results), "results": results}
    if arguments.out:
        write_json(arguments.out, report)
    print(markdown(report))
    if report["not_measured"]:
        print(f"not measured, for lack of time: {report['not_measured']}")


if __name__ == "__main__":
    main()
