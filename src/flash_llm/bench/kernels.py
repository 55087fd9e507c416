"""How fast the sparse kernel is beside the best dense product of torch, in one run.

``flash-llm bench kernels`` is the command. Times are medians of replays of CUDA graphs whose launches go through copies
of the weight, at least 400 MB of them, so that the L2 cache helps neither side. x and y are not rotated: in a model,
too, the layer before has just written x. One case is timed for some 0.2 s at most (``timing.CASE_SECONDS``), also where
thousands of rows of x make a launch take milliseconds.
"""

from __future__ import annotations

import datetime
import functools
import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flash_llm import __version__, ops
from flash_llm.bench import timing
from flash_llm.bench.peers import PEERS, Peer
from flash_llm.bench.report import means
from flash_llm.bench.shapes import Shape
from flash_llm.bench.timing import Meter
from flash_llm.environment import environment as machine
from flash_llm.errors import KernelError
from flash_llm.kernels import ahead, choice, cuda, tuned
from flash_llm.tensor import PackedWeight, ValueKind
from flash_llm.tensor.layout import VALUE_DTYPES

MAX_ERROR = 1e-2
"""Relative error from which on a result is wrong and not just rounded: bfloat16's is near 2e-3."""

_CHECKED_ROWS = 1024
_ENDED = "the run ended before"
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shapes: (rows, columns) of the weights.
        sparsities: shares of zeros, at random places.
        ns: numbers of rows of x.
        dtype: of weights and x, one of ``layout.VALUE_DTYPES``.
        values: how packed nonzeros are stored: "16-bit", "float8_e4m3" or "int8".
        peers: measure what torch offers for sparse weights too.
        check: compare every result with float32's.
        time_limit: seconds after which no further weight is begun.
        kernel: one of ``kernels.choice.KERNELS``.

    Raises:
        ValueError: a dtype that weights can't be packed in, unknown values, a time limit that isn't positive, or no
            such kernel.
    """

    shapes: list[Shape]
    sparsities: list[float]
    ns: list[int]
    dtype: torch.dtype = torch.float16
    values: str = ValueKind.BITS16.value
    peers: bool = False
    check: bool = True
    time_limit: float = math.inf
    kernel: str = choice.AUTO

    def __post_init__(self) -> None:
        if self.dtype not in VALUE_DTYPES:
            raise ValueError(f"dtype {self.dtype}: packed weights are {' or '.join(map(str, VALUE_DTYPES))}")
        ValueKind(self.values)
        if not self.time_limit > 0:
            raise ValueError(f"time limit {self.time_limit}: it takes seconds, more than 0")
        choice.check(self.kernel)


@dataclass
class _Run:
    """A run under way: what is fixed for all of its cases, when it began, and the report so far."""

    settings: Settings
    meter: Meter
    report: Row
    on_change: Callable[[Row], None]
    begin: float = field(default_factory=time.monotonic)

    def late(self) -> bool:
        return time.monotonic() - self.begin > self.settings.time_limit

    def measured(self, case: Row, rows: list[Row]) -> None:
        """Takes a weight's rows into the report."""
        self.report["results"] += rows
        self.report["means"] = means(self.report["results"])
        self.report["not_measured"].remove(case)
        self.on_change(self.report)

    def given_up(self, case: Row, why: str) -> None:
        """Notes why a weight is not measured."""
        case["why"] = why
        self.on_change(self.report)


def measure(
    settings: Settings,
    meter: Meter,
    *,
    command: str = "",
    on_change: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measures all of ``settings``.

    Args:
        meter: times, on its own device.
        command: what the user typed, for the report.
        on_change: is given the report so far whenever a weight has been measured, or given up.

    Returns:
        A JSON-ready report: ``environment``, ``read_bandwidth`` in bytes a second and how it was measured,
        ``not_measured`` (each with the reason; of a report so far, what is still to come too), ``means`` and
        ``results`` (see :func:`flash_llm.bench.report.means`).

    Raises:
        KernelError: a kernel fails, or its result is wrong.
    """
    begin = time.monotonic()
    with torch.no_grad(), choice.using(settings.kernel):
        report = {
            "environment": environment(command, meter.device) | _kernel(settings.kernel, meter.device),
            "read_bandwidth": meter.read_bandwidth(),
            "read_bandwidth_how": timing.READ_BANDWIDTH_HOW,
            "not_measured": [
                {"rows": rows, "columns": columns, "sparsity": sparsity, "why": _ENDED}
                for rows, columns in settings.shapes
                for sparsity in settings.sparsities
            ],
            "means": [],
            "results": [],
        }
        run = _Run(settings, meter, report, on_change, begin)
        for shape in settings.shapes:
            _shape(run, shape)
            if meter.device.type == "cuda":
                torch.cuda.empty_cache()
    return report


def _kernel(name: str, device: torch.device) -> dict[str, Any]:
    """The kernel that is asked for, and how many of its plans `flash-llm tune` has chosen."""
    return {"kernel": name, "tuned_plans": len(tuned.table(device.index, name)) if device.type == "cuda" else 0}


def environment(command: str, device: torch.device) -> dict[str, Any]:
    """The GPU and the versions that figures depend on."""
    here = machine()
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": here["cuda"]["driver"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvrtc": here["cuda"]["nvrtc"],
        "python": platform.python_version(),
        "flash_llm": __version__,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _shape(run: _Run, shape: Shape) -> None:
    """Measures a row for every sparsity and n, or notes why there is none."""
    generator = torch.Generator(run.meter.device).manual_seed(0)
    left = [case for case in run.report["not_measured"] if (case["rows"], case["columns"]) == shape]
    why = f"the time limit of {run.settings.time_limit:g} s"
    try:
        if not run.late():
            xs = {n: _random((n, shape[1]), run, generator) for n in run.settings.ns}
            dense = _dense(run, shape, xs, generator)
            while left and not run.late():
                rows = _sparsity(run, shape, left[0]["sparsity"], xs, dense, generator)
                run.measured(left.pop(0), rows)
    except torch.OutOfMemoryError:
        why = "out of GPU memory"
    for case in left:
        run.given_up(case, why)


def _random(shape: Shape, run: _Run, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=run.meter.device, dtype=run.settings.dtype)


def _dense(run: _Run, shape: Shape, xs: dict[int, Tensor], generator: torch.Generator) -> dict[int, Row]:
    """Microseconds of F.linear and of torch.mm(W, X^T) for every x: the best of both is what sparse is held against."""
    weight = _random(shape, run, generator)
    weights = timing.rotated(weight, weight.clone)
    launches = timing.launches(len(weights))

    def times(x: Tensor) -> Row:
        linear = run.meter.graph(lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]), launches)
        state = run.meter.state
        mm = run.meter.graph(lambda i: torch.mm(weights[i % len(weights)], x.t()), launches)
        state = state if linear < mm else run.meter.state
        times = {"dense_us": min(linear, mm), "dense_linear_us": linear, "dense_mm_us": mm}
        return times | {f"dense_{name}": value for name, value in state.items()}

    return {n: times(x) for n, x in xs.items()}


def _sparsity(
    run: _Run, shape: Shape, sparsity: float, xs: dict[int, Tensor], dense: dict[int, Row], generator: torch.Generator
) -> list[Row]:
    """A row for every n of one weight, which is made and packed once."""
    weight = _random(shape, run, generator)
    weight.masked_fill_(torch.rand(shape, generator=generator, device=weight.device) < sparsity, 0)
    packed = PackedWeight.from_dense(weight, values=run.settings.values)
    if weight.device.type == "cuda":
        wait(ahead.begin_weight(packed, xs))
    stored = weight if packed.scales is None else packed.to_dense(torch.float32)
    weights = timing.rotated(packed, functools.partial(clone, packed))
    rows: list[Row] = [
        {"rows": shape[0], "columns": shape[1], "sparsity": sparsity, "n": n, "dtype": _name(weight.dtype)}
        | {"values": packed.kind.value}
        | _sparse(run, weights, x, dense[n], stored)
        for n, x in xs.items()
    ]
    del packed, weights, stored
    if run.settings.peers:
        peers = {name: _peer(run, build, weight, xs) for name, build in PEERS.items()}
        for row in rows:
            row["peers"] = {name: _beside(row["dense_us"], of_n[row["n"]]) for name, of_n in peers.items()}
    return rows


def _sparse(run: _Run, weights: list[PackedWeight], x: Tensor, dense: Row, weight: Tensor) -> Row:
    packed = weights[0]
    (rows, columns), n = packed.shape, x.shape[0]
    error = relative_error(ops.linear(x, packed), x, weight) if run.settings.check else None
    if error is not None and not error <= MAX_ERROR:  # so that NaN counts as wrong
        raise KernelError(
            f"the sparse kernel's result for {rows}x{columns}, n={n}, at {packed.sparsity:.0%} zeros is wrong: "
            f"relative error {error:.2g}, more than {MAX_ERROR:g}; please report it with what `flash-llm env` prints"
        )
    us = run.meter.graph(lambda i: ops.linear(x, weights[i % len(weights)]), timing.launches(len(weights)))
    moved = packed.nbytes + x.element_size() * n * (rows + columns)
    return {
        "us": us,
        **run.meter.state,
        **dense,
        "speedup": dense["dense_us"] / us,
        "bytes_moved": moved,
        "gigabytes_a_second": moved / us * 1e-3,
        "bandwidth_share": moved / us * 1e6 / run.report["read_bandwidth"],
        "bytes_an_element": packed.nbytes / (rows * columns),
        "relative_error": error,
        "tile_words": packed.tile_words,
        "kernel": cuda.configurations(packed, n)[0][0] if packed.device.type == "cuda" else "reference",
        "rotated_bytes": len(weights) * packed.nbytes,
    }


def clone(weight: PackedWeight) -> PackedWeight:
    """The same weight in memory of its own."""
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    return replace(weight, **copies)


def _peer(run: _Run, build: Callable[[Tensor], Peer], weight: Tensor, xs: dict[int, Tensor]) -> dict[int, Row]:
    """A peer's microseconds and error for every n, or what it says in refusing."""
    try:
        built = timing.rotated(build(weight), functools.partial(build, weight))
    except Exception as refusal:  # whatever torch raises: it is noted, and the others go on
        return {n: _refused(refusal) for n in xs}
    return {n: _peer_row(run, built, x, weight) for n, x in xs.items()}


def _peer_row(run: _Run, built: list[Peer], x: Tensor, weight: Tensor) -> Row:
    try:
        error = relative_error(built[0](x), x, weight) if run.settings.check else None
        # Not as a graph: cuSPARSE may allocate, and a capture that fails would take the rest of the run with it.
        us = run.meter.queued(lambda i: built[i % len(built)](x), timing.launches(len(built)))
    except Exception as refusal:
        return _refused(refusal)
    return {"us": us, "relative_error": error if error is None or math.isfinite(error) else None}


def _refused(refusal: Exception) -> Row:
    return {"refused": f"{type(refusal).__name__}: {' '.join(str(refusal).split())[:300]}"}


def _beside(dense_us: float, row: Row) -> Row:
    return row if "refused" in row else row | {"speedup": dense_us / row["us"]}


def relative_error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """||y - x W^T|| / ||x W^T||, or ||y|| where zeros are expected, with the product in float32.

    Some rows at a time, since y in float32 may be gigabytes.
    """
    wide = weight.float().t()
    wrong, right = 0.0, 0.0
    for some_y, some_x in zip(y.split(_CHECKED_ROWS), x.split(_CHECKED_ROWS), strict=True):
        expected = some_x.float() @ wide
        right += float(expected.norm()) ** 2
        wrong += float((some_y.float() - expected).norm()) ** 2
    return math.sqrt(wrong) / (math.sqrt(right) or 1.0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
