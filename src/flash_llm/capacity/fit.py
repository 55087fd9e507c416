"""Efficiencies from measurements: ``flash-llm bench kernels``, decode steps of an engine, ``flash-llm bench machine``.

Each fit is least squares of relative errors, so that small matrices count as much as large ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_llm.capacity.efficiency import DenseKernel, Efficiency, Engine, SparseKernel
from flash_llm.capacity.gpus import GPUS, find_gpu
from flash_llm.capacity.models import ModelShape
from flash_llm.capacity.roofline import ALL_REDUCES, Rates, Roofline
from flash_llm.capacity.sizes import Format

Row = dict[str, Any]
DENSE_READS = 64
"""Rows of x up to which cuBLAS's time is that of reading the weights, on any GPU of the table."""

FORMS = {"fp16": Format("dense"), "fp8": Format("fp8"), "int4": Format("int4")}


def fit_sparse(results: list[Row], bandwidth: float) -> SparseKernel:
    """The sparse kernel's time from rows of ``flash-llm bench kernels``; ``bandwidth``: the measured bytes a second."""
    ns = sorted({row["n"] for row in results})

    def column(value: Callable[[Row], float]) -> Tensor:
        return torch.tensor([float(value(row)) for row in results], dtype=torch.float64)

    us, elements = column(lambda row: row["us"]), column(lambda row: row["rows"] * row["columns"])
    density = column(lambda row: 1 - row["sparsity"])
    reading = (elements * column(lambda row: row["bytes_an_element"]) + column(_activations)) / bandwidth * 1e6
    of_n = torch.tensor([ns.index(row["n"]) for row in results])
    start = [math.log(4.0), 3.0] + [math.log(5.0)] * len(ns) + [math.log(0.1)] * (2 * len(ns))
    parameters = torch.tensor(start, dtype=torch.float64, requires_grad=True)

    def power_and_read() -> tuple[Tensor, Tensor]:
        """Nothing is read faster than was measured. Where decoding takes all of the time, the fit by itself would let
        reading take none, and be wrong on GPUs of less bandwidth."""
        return parameters[0].exp(), parameters[1].sigmoid()

    def predicted() -> Tensor:
        power, read = power_and_read()
        launch, element, nonzero = parameters[2:].exp().view(3, len(ns))[:, of_n]
        decoding = elements * (element + nonzero * density) * 1e-6
        return launch + ((reading / read) ** (1 + power) + decoding ** (1 + power)) ** (1 / (1 + power))

    def loss() -> Tensor:
        return (predicted().log() - us.log()).square().mean()

    _minimise(loss, parameters)
    power, read = (float(value.detach()) for value in power_and_read())
    launch, element, nonzero = parameters[2:].exp().view(3, len(ns)).tolist()
    return SparseKernel(
        n=tuple(ns),
        launch_us=_round(launch),
        element_ps=_round(element),
        nonzero_ps=_round(nonzero),
        power=round(1 + power, 4),
        read=round(read, 4),
    )


def fit_dense(results: list[Row], bandwidth: float) -> DenseKernel:
    """cuBLAS's time from the same rows, where it only reads."""
    few = (row for row in results if row["n"] <= DENSE_READS)
    rows = list({(row["rows"], row["columns"], row["n"]): row for row in few}.values())
    us = torch.tensor([row["dense_us"] for row in rows], dtype=torch.float64)
    nbytes = [2 * row["rows"] * row["columns"] + _activations(row) for row in rows]
    reading = torch.tensor(nbytes, dtype=torch.float64) / bandwidth * 1e6
    launch, slower = _least_squares(torch.stack([torch.ones_like(us), reading], 1), us)
    return DenseKernel(round(launch, 3), round(1 / slower, 4))


def fit_engine(rows: list[Row], models: dict[str, ModelShape], rates: Rates, known: Efficiency) -> Engine:
    """What an engine adds, from decode steps; ``known`` has the kernels' figures.

    Args:
        rows: each with ``model``, ``precision`` (of FORMS), ``gpus``, ``batch``, ``input_len``, ``output_len`` and
            ``decode_step_ms``.

    Raises:
        ValueError: rows that don't determine all of it, so that a share comes out negative.
    """
    names = ("fp8", "int4")
    coefficients, left = [], []
    for row in rows:
        line = Roofline(models[row["model"]], rates, row["gpus"], known)
        form, batch = FORMS[row["precision"]], row["batch"]
        quantised = {name: _reading_us(line, form, batch) if row["precision"] == name else 0.0 for name in names}
        fixed = line.head_us(batch) + sum(
            linear.count * known.dense.launch_us if row["precision"] in names else line.linear_us(form, linear, batch)
            for linear in line.model.linears
        )
        blocks = len(line.model.caches)
        sums = ALL_REDUCES * blocks if row["gpus"] > 1 else 0
        sent = line.sums_us(batch) - sums * known.engine.all_reduce_us
        cache = line.cache_us(batch, mean_context(row)) * known.engine.kv_read
        coefficients.append([blocks, cache, *quantised.values(), sums])
        left.append(row["decode_step_ms"] * 1e3 - fixed - sent)
    measured = torch.tensor([row["decode_step_ms"] * 1e3 for row in rows], dtype=torch.float64)
    layer, kv, fp8, int4, all_reduce = _least_squares(
        torch.tensor(coefficients, dtype=torch.float64), torch.tensor(left, dtype=torch.float64), measured
    )
    if min(layer, kv, fp8, int4, all_reduce) <= 0:
        raise ValueError(
            "the decode steps don't determine the engine's figures: measure more batches of each precision"
        )
    return Engine(round(layer, 3), round(1 / kv, 4), round(1 / fp8, 4), round(1 / int4, 4), round(all_reduce, 3))


def mean_context(row: Row) -> float:
    """Tokens that a decode step finds in the cache, on average over the output."""
    return float(row["input_len"] + row["output_len"] / 2)


def reference_shares(bandwidth: float, gpu: str) -> tuple[str, float]:
    """The table's name of a GPU by torch's name, and its measured read bandwidth over the published."""
    found = find_gpu(gpu)
    return found.name, round(bandwidth / GPUS[found.name].bandwidth, 4)


def _reading_us(line: Roofline, form: Format, n: int) -> float:
    """Microseconds to read all linear layers and their activations at the full read bandwidth."""
    total = sum(
        linear.count * (form.nbytes(sum(linear.rows), linear.columns) + 2 * n * (sum(linear.rows) + linear.columns))
        for linear in line.model.linears
    )
    return total / line.gpus / line.rates.read * 1e6


def _activations(row: Row) -> float:
    return 2.0 * row["n"] * (row["rows"] + row["columns"])


def _least_squares(coefficients: Tensor, left: Tensor, scale: Tensor | None = None) -> list[float]:
    scale = left if scale is None else scale
    return torch.linalg.lstsq(coefficients / scale[:, None], (left / scale)[:, None]).solution.flatten().tolist()


def _minimise(loss: Callable[[], Tensor], parameters: Tensor) -> None:
    optimizer = torch.optim.LBFGS([parameters], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _round(values: list[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
