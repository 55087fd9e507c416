"""The planner's predictions against what was measured; `--fit` makes its efficiencies anew from the measurements.

    python examples/check_predictions.py           # the tables of docs/hardware.md
    python examples/check_predictions.py --fit     # writes src/flash_llm/capacity/efficiency.json

Measurements: docs/results/kernels-h100.json (`flash-llm bench kernels`), kernels-fp8-h100.json (the same with 8-bit
values), kernels-n-h100.json (over many numbers of rows of x), vllm-dense-h100.json (dense models in vLLM),
e2e-*.json (sparse ones, `flash-llm bench e2e`), kernels-h200.json (another GPU, to which nothing is fitted) and, if it
is there, machine-h100.json (`flash-llm bench machine`).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flash_llm.capacity import fit
from flash_llm.capacity.efficiency import FILE, Efficiency, Engine, efficiency
from flash_llm.capacity.gpus import GPUS, Gpu, find_gpu, read_machine
from flash_llm.capacity.models import ModelShape, load_model
from flash_llm.capacity.plan import Workload, cache_room, speed, weights_bytes
from flash_llm.capacity.roofline import Rates, Roofline, rates
from flash_llm.capacity.sizes import Format, packed_nbytes, sparse_format
from flash_llm.files import write_json
from flash_llm.tensor import ValueKind

SPARSE_MODELS = (
    "opt-30b-80-h100",
    "opt-30b-best-h100",
    "opt-30b-8-bit-h100",
    "opt-30b-h100",
    "opt-30b-second-h100",
    "opt-30b-50-h100",
    "opt-30b-before-h100",
    "opt-66b-h100",
    "opt-66b-one-h100",
    "opt-175b-h200",
    "llama-3-8b-h100",
    "llama-3-8b-1024-h100",
    "llama-3-70b-h100",
)
SETTLED_MODELS = (  # whose packed weights lie in memory of their own size
    "opt-30b-80-h100",
    "opt-30b-8-bit-h100",
    "opt-30b-h100",
    "opt-66b-one-h100",
    "llama-3-8b-1024-h100",
)
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
ASSUMED_MATRIX_SHARE = 0.7
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies and write them")
    if parser.parse_args().fit:
        write_json(FILE, fitted().to_dict())
        print(f"wrote {FILE}")
    else:
        print(tables(), end="")


def read(name: str) -> dict[str, Any]:
    """A file of measurements."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def fitted() -> Efficiency:
    """Efficiencies from all measurements."""
    kernels, engine, of_8_bits = (read(f"{name}-h100.json") for name in ("kernels", "vllm-dense", "kernels-fp8"))
    bandwidth, gpu = kernels["read_bandwidth"], kernels["environment"]["gpu"]
    name, share = fit.reference_shares(bandwidth, gpu)
    machine = RESULTS / "machine-h100.json"
    measured = read_machine(machine) if machine.is_file() else None
    matrix = measured.matrix_rate / GPUS[name].matrix_rate if measured else ASSUMED_MATRIX_SHARE
    known = Efficiency(
        reference=name,
        read_share=share,
        matrix_share=round(matrix, 4),
        launch_us=measured.launch_us if measured else None,
        sparse=fit.fit_sparse(kernels["results"], bandwidth),
        sparse_8_bit=fit.fit_sparse(of_8_bits["results"], of_8_bits["read_bandwidth"]),
        dense=fit.fit_dense(kernels["results"], bandwidth),
        engine=Engine(1.0, 1.0, 1.0, 1.0, 1.0),
        basis=basis(measured is not None, *(max(row["n"] for row in each["results"]) for each in (kernels, of_8_bits))),
    )
    return replace(
        known, engine=fit.fit_engine(engine["results"], models(engine), rates(GPUS[name], None, known), known)
    )


def basis(machine: bool, most: int, most_8_bit: int) -> dict[str, str]:
    """What stands behind each figure; ``most``: rows of x that the kernel was measured with, and with 8-bit values."""
    return {
        "read_share": "measured on one H100 SXM; assumed for all other GPUs",
        "matrix_share": "measured on one H100 SXM; assumed for all other GPUs" if machine else "assumed",
        "sparse": f"fitted to the sparse kernel on one H100 SXM, up to {most} rows of x; elsewhere predicted from "
        "bandwidth, multiprocessors and clock; more rows, and unpacking: predicted",
        "sparse_8_bit": f"fitted to the sparse kernel with float8 values on one H100 SXM, up to {most_8_bit} rows of "
        "x; for other GPUs than Hopper as 16-bit values",
        "dense": f"fitted to cuBLAS on one H100 SXM, up to {fit.DENSE_READS} rows of x; elsewhere predicted",
        "engine.layer_us, kv_read": "fitted to vLLM on one H100 SXM; elsewhere predicted",
        "engine.fp8_read, int4_read": "fitted to vLLM on one H100 SXM, where it only reads; elsewhere predicted",
        "engine.all_reduce_us": "fitted to vLLM on two H100 SXM; four times as much over PCIe is assumed",
        "memory": "that all but 1.8 GiB of the share asked for is free for weights and KV cache is the mean of four "
        "models in vLLM on H100s; the share of a GPU's published memory that a program finds is assumed",
    }


@functools.cache
def shape(name: str) -> ModelShape:
    """A built-in model, built once."""
    return load_model(name)


def models(report: dict[str, Any]) -> dict[str, ModelShape]:
    """Those of the engine's rows."""
    return {name: shape(name) for name in sorted({row["model"] for row in report["results"]})}


def tables() -> str:
    """The tables of docs/hardware.md, in Markdown."""
    kernels, engine = read("kernels-h100.json"), read("vllm-dense-h100.json")
    gpu = find_gpu(kernels["environment"]["gpu"])
    parts = [
        "### The sparse kernel",
        *kernel_table(kernels),
        "",
        "### The sparse kernel with 8-bit values",
        *kernel_table(read("kernels-fp8-h100.json")),
        "",
        "### The sparse kernel on an H200",
        *kernel_table(read("kernels-h200.json")),
        "",
        "### More rows of x",
        *many_rows_table(read("kernels-n-h100.json"), rates(gpu), kernels["results"][-1]["n"]),
        "",
        "### Decode steps in vLLM",
        *engine_table(engine, rates(gpu)),
        "",
        "### Sparse models in vLLM",
        *sparse_engine_table([read(f"e2e-{name}.json") for name in SPARSE_MODELS]),
        "",
        "### Memory in vLLM",
        *memory_table(engine, rates(gpu)),
        *sparse_memory_rows([read(f"e2e-{name}.json") for name in SETTLED_MODELS]),
    ]
    return "\n".join(parts) + "\n"


def kernel_table(report: dict[str, Any]) -> list[str]:
    """Mean and worst error of time and bytes for each number of rows of x and share of zeros."""
    nothing = ModelShape("", 0, (), (0, 0), 0, (), 1, 0, None)
    gpu = find_gpu(report["environment"]["gpu"])
    line = Roofline(nothing, rates(gpu), 1, efficiency())
    values = ValueKind(report["results"][0]["values"])
    kind = "" if values is ValueKind.BITS16 else f", {values.value} values"
    kind += "" if gpu.name == efficiency().reference else f", {gpu.name}"
    lines = [
        "",
        f"| N{kind} | zeros | shapes | time: mean error | worst | worst is | packed bytes: worst error |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = sorted({(row["n"], row["sparsity"]) for row in report["results"]})
    for n, sparsity in cases:
        rows = [row for row in report["results"] if (row["n"], row["sparsity"]) == (n, sparsity)]
        form = Format("sparse", sparsity, values)
        times = [line.matrix_us(form, row["rows"], row["columns"], n) / row["us"] - 1 for row in rows]
        sizes = [packed_nbytes(row["rows"], row["columns"], sparsity, values) / real_bytes(row) - 1 for row in rows]
        worst = max(range(len(rows)), key=lambda i: abs(times[i]))
        where = f"{rows[worst]['rows']}x{rows[worst]['columns']}"
        mean = statistics.mean(map(abs, times))
        lines.append(
            f"| {n} | {sparsity:.0%} | {len(rows)} | {mean:.1%} | {times[worst]:+.1%} | {where} | "
            f"{max(sizes, key=abs):+.2%} |"
        )
    return lines


def many_rows_table(report: dict[str, Any], on: Rates, fitted: int) -> list[str]:
    """Errors of the sparse product's time above the numbers of rows of x that were fitted: one line for each number."""
    line = Roofline(ModelShape("", 0, (), (0, 0), 0, (), 1, 0, None), on, 1, efficiency())
    cases: dict[tuple[str, float], dict[int, float]] = {}
    for row in report["results"]:
        if row["n"] > fitted:
            predicted = line.matrix_us(Format("sparse", row["sparsity"]), row["rows"], row["columns"], row["n"])
            case = f"{row['rows']}x{row['columns']}", row["sparsity"]
            cases.setdefault(case, {})[row["n"]] = predicted / row["us"] - 1
    lines = ["", "| N | " + " | ".join(f"{where}, {zeros:.0%}" for where, zeros in cases) + " |"]
    lines.append("|---" * (1 + len(cases)) + "|")
    for n in sorted({n for errors in cases.values() for n in errors}):
        lines.append(f"| {n} | " + " | ".join(f"{errors[n]:+.1%}" for errors in cases.values()) + " |")
    return lines


def real_bytes(row: Row) -> float:
    """Bytes of a measured packed weight."""
    return row["bytes_an_element"] * row["rows"] * row["columns"]


def engine_table(report: dict[str, Any], on: Rates) -> list[str]:
    """Every measured row: steps as fitted, steps with this row left out of the fit, and tokens a GPU-second."""
    known, shapes = efficiency(), models(report)
    lines = [
        "",
        "| model | precision | GPUs | batch | step, measured | predicted | error | left out of the fit | "
        "tokens a GPU-second, measured | predicted | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for i, row in enumerate(report["results"]):
        others = report["results"][:i] + report["results"][i + 1 :]
        without = replace(known, engine=fit.fit_engine(others, shapes, on, known))
        step, blind = (step_ms(row, shapes, on, how) for how in (known, without))
        tokens = throughput(row, shapes, on, known)
        cells: Iterable[str] = (
            row["model"],
            row["precision"],
            str(row["gpus"]),
            str(row["batch"]),
            f"{row['decode_step_ms']:.1f} ms",
            f"{step:.1f} ms",
            f"{step / row['decode_step_ms'] - 1:+.1%}",
            f"{blind / row['decode_step_ms'] - 1:+.1%}",
            f"{row['tokens_per_gpu_second']}",
            f"{tokens:.0f}",
            f"{tokens / row['tokens_per_gpu_second'] - 1:+.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sparse_engine_table(reports: list[dict[str, Any]]) -> list[str]:
    """Decode steps of sparse models: by the kernel's fit and what vLLM adds to dense models, nothing fitted to them."""
    lines = [
        "",
        "| model | GPU | weights | GPUs | batch | input | step, measured | predicted | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [
        (report["settings"]["model"], find_gpu(report["environment"]["gpu"]), row)
        for report in reports
        for row in report["results"]
        if row["sparsity"] is not None
    ]
    for name, gpu, row in sorted(rows, key=_by_weights):
        line, form = Roofline(shape(name), rates(gpu), row["gpus"], efficiency()), sparse_format(row["weights"])
        step = line.step_us(form, row["batch"], fit.mean_context(row)) * 1e-3
        real = row["time_per_output_token_ms"]
        lines.append(
            f"| {name} | {gpu.name} | {form.name} | {row['gpus']} | {row['batch']} | {row['input_len']} | "
            f"{real:.1f} ms | {step:.1f} ms | {step / real - 1:+.1%} |"
        )
    return lines


def _by_weights(each: tuple[str, Gpu, Row]) -> tuple[int, str, str, int]:
    name, _, row = each  # shorter names are of smaller models
    return len(name), name, row["weights"], row["batch"]


def step_ms(row: Row, shapes: dict[str, ModelShape], on: Rates, known: Efficiency) -> float:
    """Predicted milliseconds of a decode step."""
    line = Roofline(shapes[row["model"]], on, row["gpus"], known)
    return line.step_us(fit.FORMS[row["precision"]], row["batch"], fit.mean_context(row)) * 1e-3


def throughput(row: Row, shapes: dict[str, ModelShape], on: Rates, known: Efficiency) -> float:
    """Predicted tokens a GPU-second."""
    line = Roofline(shapes[row["model"]], on, row["gpus"], known)
    workload = Workload(row["input_len"], row["output_len"])
    return speed(line, fit.FORMS[row["precision"]], row["batch"], workload).tokens_per_gpu_second


def memory_table(report: dict[str, Any], on: Rates) -> list[str]:
    """Weights and room for the KV cache on each GPU."""
    shapes = models(report)
    lines = [
        "",
        "| model | precision | GPUs | weights a GPU, measured | predicted | error | KV cache, measured | predicted | "
        "error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in {(row["model"], row["precision"]): row for row in report["results"]}.values():
        model, form = shapes[row["model"]], fit.FORMS[row["precision"]]
        measured = row["weights_gib_a_gpu"], row["kv_tokens"]
        lines.append(memory_row(model, row["precision"], form, row["gpus"], on, report["memory_share"], measured))
    return lines


def sparse_memory_rows(reports: list[dict[str, Any]]) -> list[str]:
    """More of them, of sparse models."""
    lines = []
    for report in reports:
        settings, gpu = report["settings"], find_gpu(report["environment"]["gpu"])
        for row in {row["weights"]: row for row in report["results"] if row["sparsity"] is not None}.values():
            model, form = shape(settings["model"]), sparse_format(row["weights"])
            measured = row["weight_bytes"] / 2**30, row["kv_cache_tokens"]
            lines.append(
                memory_row(model, form.name, form, row["gpus"], rates(gpu), settings["memory_share"], measured)
            )
    return lines


def memory_row(
    model: ModelShape, kind: str, form: Format, gpus: int, on: Rates, share: float, measured: tuple[float, int]
) -> str:
    """GiB of weights and tokens of KV cache on each GPU, as measured and as predicted."""
    weights = weights_bytes(model, form, gpus) / 2**30
    tokens = cache_room(model, on, form, gpus, share) / (2 * sum(cache.elements(1, gpus) for cache in model.caches))
    return (
        f"| {model.name} | {kind} | {gpus} | {measured[0]:.1f} GiB | {weights:.1f} GiB | "
        f"{weights / measured[0] - 1:+.1%} | {measured[1]:,} tokens | {tokens:,.0f} tokens | "
        f"{tokens / measured[1] - 1:+.1%} |"
    )


if __name__ == "__main__":
    main()
