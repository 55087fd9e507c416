"""How much of a GPU's rates kernels and engines reach: measured where it was, assumed where it wasn't, and which.

The figures are in ``efficiency.json``; :mod:`flash_llm.capacity.fit` makes it from measurements.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("efficiency.json")


@dataclass(frozen=True)
class SparseKernel:
    """Microseconds of the sparse kernel on the reference GPU, fitted.

    ``launch_us + (reading ** power + decoding ** power) ** (1 / power)``: bytes over the read bandwidth times ``read``,
    and picoseconds for each element and each nonzero. Lists have an entry for each of ``n``, the rows of x that were
    measured, and the next larger one stands for those between.
    """

    n: tuple[int, ...]
    launch_us: tuple[float, ...]
    element_ps: tuple[float, ...]
    nonzero_ps: tuple[float, ...]
    power: float
    read: float


@dataclass(frozen=True)
class DenseKernel:
    """``launch_us`` and bytes over the read bandwidth times ``read``: cuBLAS on the reference GPU, fitted."""

    launch_us: float
    read: float


@dataclass(frozen=True)
class Engine:
    """What vLLM adds to its matrix products, and reaches with quantised ones: fitted to decode steps.

    Attributes:
        layer_us: microseconds of a block besides its matrix products and its KV cache: norms, activations, launches.
        kv_read, fp8_read, int4_read: shares of the read bandwidth for the KV cache and for weights.
        all_reduce_us: of one sum over GPUs, for its latency.
    """

    layer_us: float
    kv_read: float
    fp8_read: float
    int4_read: float
    all_reduce_us: float


@dataclass(frozen=True)
class Efficiency:
    """All of it, and the reference GPU that it was measured on.

    Attributes:
        reference: the GPU's name in the table.
        read_share: measured read bandwidth over the published.
        matrix_share: attained matrix rate over the published.
        launch_us: of a tiny kernel in a graph, by ``flash-llm bench machine``; None: not measured.
        sparse_8_bit: the sparse kernel with 8-bit values, which Hopper multiplies as they are; elsewhere they are
            widened, and ``sparse`` stands for their decoding.
        basis: for every figure, in words, whether it is measured or assumed.
    """

    reference: str
    read_share: float
    matrix_share: float
    launch_us: float | None
    sparse: SparseKernel
    sparse_8_bit: SparseKernel
    dense: DenseKernel
    engine: Engine
    basis: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = dict(vars(self))
        return plain | {name: dict(vars(plain[name])) for name in _PARTS}


_PARTS = {"sparse": SparseKernel, "sparse_8_bit": SparseKernel, "dense": DenseKernel, "engine": Engine}


@functools.cache
def efficiency() -> Efficiency:
    """The figures that come with the package."""
    return from_dict(json.loads(FILE.read_text(encoding="utf-8")))


def from_dict(value: dict[str, Any]) -> Efficiency:
    """The inverse of :meth:`Efficiency.to_dict`."""
    parts = {
        name: part(**{k: tuple(v) if isinstance(v, list) else v for k, v in value[name].items()})
        for name, part in _PARTS.items()
    }
    return Efficiency(**{**value, **parts})
