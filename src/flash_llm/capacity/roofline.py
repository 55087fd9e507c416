"""Time from bytes and operations: the slower of the two, with the efficiencies of ``efficiency.py``."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from flash_llm.capacity.efficiency import Efficiency, SparseKernel, efficiency
from flash_llm.capacity.gpus import GPUS, Gpu, Machine
from flash_llm.capacity.models import Linear, ModelShape
from flash_llm.capacity.sizes import Format
from flash_llm.tensor import ValueKind

ALL_REDUCES = 2
"""Sums over GPUs in a block: after attention and after the MLP."""

SLOW_ALL_REDUCE = 4.0
"""How many times NVLink's latency a sum takes over PCIe. Assumed."""

_NOT_OVERLAPPED = 0.25  # of a sparse weight's decoding with many rows of x: see docs/hardware.md
_NOT_OVERLAPPED_FROM, _NOT_OVERLAPPED_TO = 64, 96  # rows of x between which that grows to its full
_BYTES = 2  # of an activation, of an element of the KV cache, and of a weight that stays dense


@dataclass(frozen=True)
class Rates:
    """What a GPU attains, and what to call it.

    Attributes:
        name: the GPU's.
        memory: bytes that a program finds.
        read: bytes a second.
        matrix, fp8: operations a second; fp8 None: the GPU has no such units.
        decoding: how much slower than the reference GPU it decodes sparse weights: by multiprocessors times clock.
        overhead: how much slower than the reference GPU it launches kernels.
        link: bytes a second between GPUs, in one direction.
        all_reduce: how many times the reference's latency a sum over GPUs takes.
        measured: whether memory, read and matrix are measured on this very GPU.
        wide: whether the sparse kernel is Hopper's, which takes more than 64 rows of x at a time.
    """

    name: str
    memory: float
    read: float
    matrix: float
    fp8: float | None
    decoding: float
    overhead: float
    link: float
    all_reduce: float
    measured: bool
    wide: bool


def rates(gpu: Gpu, machine: Machine | None = None, known: Efficiency | None = None) -> Rates:
    """A GPU's attained rates: as ``machine`` measured them, or its published ones times the reference GPU's shares."""
    known = known or efficiency()
    reference = GPUS[known.reference]
    name, read, matrix = gpu.name, gpu.bandwidth * known.read_share, gpu.matrix_rate * known.matrix_share
    fp8 = None if gpu.fp8_rate is None else gpu.fp8_rate * known.matrix_share
    memory, overhead = gpu.memory * gpu.usable, 1.0
    if machine is not None:
        read, matrix, memory = machine.read_bandwidth, machine.matrix_rate, float(machine.memory)
        fp8 = None if gpu.fp8_rate is None else gpu.fp8_rate * matrix / gpu.matrix_rate
        overhead = machine.launch_us / known.launch_us if known.launch_us else 1.0
    return Rates(
        name=name,
        memory=memory,
        read=read,
        matrix=matrix,
        fp8=fp8,
        decoding=reference.multiprocessors * reference.clock / (gpu.multiprocessors * gpu.clock),
        overhead=overhead,
        link=gpu.link,
        all_reduce=1.0 if gpu.nvlink else SLOW_ALL_REDUCE,
        measured=machine is not None,
        wide=gpu.capability == (9, 0),
    )


@dataclass(frozen=True)
class Roofline:
    """Times of a model on some GPUs.

    Attributes:
        model: its shape.
        rates: of each GPU.
        gpus: how many share each layer.
        known: efficiencies.
    """

    model: ModelShape
    rates: Rates
    gpus: int
    known: Efficiency

    def step_us(self, form: Format, batch: int, context: float) -> float:
        """Microseconds to make one token for each of ``batch`` sequences of ``context`` tokens so far."""
        return self.products_us(form, batch) + self.cache_us(batch, context) + self.block_us() + self.sums_us(batch)

    def prefill_us(self, form: Format, batch: int, tokens: int) -> float:
        """Microseconds to read ``batch`` prompts of ``tokens`` each; the attention's triangle included."""
        n = batch * tokens
        triangle = 2 * batch * tokens**2 * self.model.query_width * len(self.model.caches) / self.gpus
        attention = triangle / self.rates.matrix * 1e6
        # Only the last token of a prompt goes through the output layer.
        linears = sum(self.linear_us(form, linear, n) for linear in self.model.linears)
        return linears + self.head_us(batch) + attention + self.block_us() + self.sums_us(n)

    def products_us(self, form: Format, n: int) -> float:
        """All matrix products for n tokens."""
        return sum(self.linear_us(form, linear, n) for linear in self.model.linears) + self.head_us(n)

    def linear_us(self, form: Format, linear: Linear, n: int) -> float:
        """The layers of one kind."""
        rows, columns = shard(linear, self.gpus)
        return linear.count * self.matrix_us(form if linear.packable else Format("dense"), sum(rows), columns, n)

    def head_us(self, n: int) -> float:
        """The output layer, which is dense and cut by its rows."""
        rows, columns = self.model.head
        return self.matrix_us(Format("dense"), math.ceil(rows / self.gpus), columns, n)

    def cache_us(self, batch: int, context: float) -> float:
        """Reading the KV cache."""
        elements = sum(cache.elements(context, self.gpus) for cache in self.model.caches)
        return _BYTES * batch * elements / (self.rates.read * self.known.engine.kv_read) * 1e6

    def block_us(self) -> float:
        """What blocks do besides."""
        return len(self.model.caches) * self.known.engine.layer_us * self.rates.overhead

    def sums_us(self, n: int) -> float:
        """Sums over GPUs, in rings: each GPU sends 2 (g - 1) / g of the activations."""
        if self.gpus == 1:
            return 0.0
        nbytes = _BYTES * n * self.model.head[1] * 2 * (self.gpus - 1) / self.gpus
        one = self.known.engine.all_reduce_us * self.rates.all_reduce + nbytes / self.rates.link * 1e6
        return ALL_REDUCES * len(self.model.caches) * one

    def matrix_us(self, form: Format, rows: int, columns: int, n: int) -> float:
        """x W^T for x [n, columns] and W [rows, columns]."""
        activations = _BYTES * n * (rows + columns)
        nbytes = form.nbytes(rows, columns)
        if form.kind == "sparse" and nbytes < _BYTES * rows * columns:
            return self._sparse_us(form, rows, columns, n)
        rate = self.rates.matrix
        read = self.known.dense.read
        if form.kind == "fp8":
            read = self.known.engine.fp8_read
            rate = self.rates.fp8 or rate
        elif form.kind == "int4":
            read = self.known.engine.int4_read
        reading = (nbytes + activations) / (self.rates.read * read) * 1e6
        computing = 2.0 * n * rows * columns / rate * 1e6
        return self.known.dense.launch_us * self.rates.overhead + max(reading, computing)

    def _sparse_us(self, form: Format, rows: int, columns: int, n: int) -> float:
        """By the sparse kernel, or unpacked and multiplied densely.

        Of many rows of x the kernel takes as many at a time as were measured; Hopper's takes more, and multiplies while
        it decodes.
        """
        most = self._kernel(form).n[-1]
        if n <= most:
            return self._spmm_us(form, rows, columns, n)
        dense, decoding = Format("dense"), self._spmm_us(form, rows, columns, most)
        turns, rest = divmod(n, most)
        kernel = turns * decoding + (self._spmm_us(form, rows, columns, rest) if rest else 0.0)
        if self.rates.wide:
            products = 2.0 * n * rows * columns / self.rates.matrix * 1e6
            grown = (n - _NOT_OVERLAPPED_FROM) / (_NOT_OVERLAPPED_TO - _NOT_OVERLAPPED_FROM)
            besides = _NOT_OVERLAPPED * min(1.0, max(0.0, grown))
            kernel = min(kernel, max(products, decoding) + besides * decoding)
        unpacking = (form.nbytes(rows, columns) + dense.nbytes(rows, columns)) / (
            self.rates.read * self.known.dense.read
        )
        return min(kernel, unpacking * 1e6 + self.matrix_us(dense, rows, columns, n))

    def _kernel(self, form: Format) -> SparseKernel:
        as_they_are = self.rates.wide and form.values is not ValueKind.BITS16
        return self.known.sparse_8_bit if as_they_are else self.known.sparse

    def _spmm_us(self, form: Format, rows: int, columns: int, n: int) -> float:
        fit = self._kernel(form)
        i = bisect_left(fit.n, n)
        nbytes = form.nbytes(rows, columns) + _BYTES * n * (rows + columns)
        reading = nbytes / (self.rates.read * fit.read) * 1e6
        each = fit.element_ps[i] + fit.nonzero_ps[i] * (1 - form.sparsity)
        decoding = rows * columns * each * 1e-6 * self.rates.decoding
        return fit.launch_us[i] * self.rates.overhead + (reading**fit.power + decoding**fit.power) ** (1 / fit.power)


def shard(linear: Linear, gpus: int) -> tuple[tuple[int, ...], int]:
    """(rows, columns) of a GPU's share: cut along the longer side, as pairs of layers are in tensor parallelism."""
    if sum(linear.rows) >= linear.columns:
        return tuple(math.ceil(rows / gpus) for rows in linear.rows), linear.columns
    return linear.rows, math.ceil(linear.columns / gpus)
