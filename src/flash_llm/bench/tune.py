"""Which plan of the sparse kernel is the quickest on this GPU for given weights. ``flash-llm tune`` is the command.

Every plan that fits is timed as ``flash-llm bench kernels`` times, and its result held against the usual plan's. What
is found is kept in the cache folder (``kernels/tuned.py``), and taken from then on.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_llm.bench import timing
from flash_llm.bench.kernels import MAX_ERROR, clone
from flash_llm.bench.shapes import Shape
from flash_llm.bench.timing import Meter
from flash_llm.capacity.models import SIBLINGS, load_model
from flash_llm.checkpoint import folder_record, load_packed
from flash_llm.errors import KernelError
from flash_llm.folder import read_config
from flash_llm.kernels import ahead, tuned
from flash_llm.kernels.plan import Device, SpmmPlan, rows_in_a_pass, unpack_from
from flash_llm.tensor import PackedWeight
from flash_llm.tensor.dummy import random_packed
from flash_llm.tensor.layout import PACKET_VALUES
from flash_llm.tensor.packed import parse_metadata
from flash_llm.tensor.stack import stack

Row = dict[str, Any]
GAIN = 0.02
"""By how much of its time a plan must beat the usual one to be taken: less is noise."""


@dataclass(frozen=True)
class Target:
    """A weight to tune for: what to call it, and how to make it on a device."""

    name: str
    make: Callable[[torch.device], PackedWeight]


def random_targets(
    shapes: Iterable[Shape], sparsities: Iterable[float], dtype: torch.dtype = torch.float16
) -> list[Target]:
    """Random weights of every shape (rows, columns) and share of zeros."""

    def target(shape: Shape, sparsity: float) -> Target:
        def make(device: torch.device) -> PackedWeight:
            generator = torch.Generator(device).manual_seed(0)
            return random_packed(*shape, sparsity, dtype, device, generator)

        return Target(f"{shape[0]}x{shape[1]} at {sparsity:.0%}", make)

    return [target(shape, sparsity) for shape in dict.fromkeys(shapes) for sparsity in sparsities]


def model_targets(model: str | Path, sparsities: list[float]) -> list[Target]:
    """The weights of a model, alone and merged as serving engines merge them (query, key and value; gate and up).

    Args:
        model: a compressed folder, whose own weights are taken; or a dense one, or a name of
            ``capacity.models.BUILT_IN``: random weights of its shapes are.
        sparsities: shares of zeros of random weights.

    Raises:
        ValueError: neither a folder nor a known name.
        CheckpointError, FormatError: a folder that is no model's, or damaged.
    """
    if Path(model).is_dir() and folder_record(read_config(Path(model))) is not None:
        return _packed_targets(Path(model))
    linears = [linear for linear in load_model(model).linears if linear.packable]
    shapes = [(rows, linear.columns) for linear in linears for rows in (*linear.rows, sum(linear.rows))]
    return random_targets(shapes, sparsities)


def _packed_targets(folder: Path) -> list[Target]:
    """One target for each kind of layer, by its last name, shape and tile size: the first, and its siblings stacked."""
    record = folder_record(read_config(folder)) or {}
    layers = {name: parse_metadata(metadata) for name, metadata in record["layers"].items()}
    kinds: dict[Any, list[str]] = {}
    for layer in layers:
        parent, _, last = layer.rpartition(".")
        groups = [[layer]]
        groups += [[f"{parent}.{name}" for name in names] for names in SIBLINGS if last == names[0]]
        for group in groups:
            if all(name in layers for name in group):
                kind = (last, *((*layers[name]["shape"], layers[name]["tile_words"]) for name in group))
                kinds.setdefault(kind, group)

    def target(group: list[str]) -> Target:
        def make(device: torch.device) -> PackedWeight:
            return stack([load_packed(folder, name).to(device) for name in group])

        return Target(" + ".join(group), make)

    return [target(group) for group in kinds.values()]


@dataclass(frozen=True)
class Tuner:
    """What tunes.

    Attributes:
        meter: times, on its own device.
        gpu: what plans are made for.
        kernel: the one of ``kernels.choice.KERNELS`` that ``gpu`` stands for.
        multiply: (x, weight, plan) to x W^T, such as ``kernels.cuda.multiply``.
        compile: plans' kernels, ahead of their use.
    """

    meter: Meter
    gpu: Device
    kernel: str
    multiply: Callable[[Tensor, PackedWeight, SpmmPlan], Tensor]
    compile: Callable[[Iterable[SpmmPlan]], object]

    def tune(
        self, targets: Iterable[Target], ns: list[int], *, time_limit: float = math.inf
    ) -> Iterator[tuple[Target, list[Row]]]:
        """Measures the targets, one after the other, until time is up.

        Args:
            ns: numbers of rows of x, below ``kernels.plan.unpack_from``. Of those that a plan treats alike the largest
                is measured, and not more than one launch takes.
            time_limit: seconds after which no further target is begun.

        Yields:
            A target and its rows, as ``kernels.tuned.read`` gives them, with ``name``, ``n``, ``sparsity``, ``us``,
            ``usual`` (warps, resident) and ``usual_us``; none where an earlier target of the same shape and tile size
            has told.

        Raises:
            ValueError: too large an n.
            KernelError: a plan's result is wrong.
        """
        if max(ns) >= (most := unpack_from(self.gpu)):
            raise ValueError(f"n {max(ns)}: from {most} rows of x on the product is torch's; give less")
        begin = time.monotonic()
        seen: set[tuned.Place] = set()
        for target in targets:
            if time.monotonic() - begin > time_limit:
                return
            with torch.no_grad():
                rows = self._target(target, ns, seen)
            if self.meter.device.type == "cuda":
                torch.cuda.empty_cache()
            yield target, rows

    def _target(self, target: Target, ns: list[int], seen: set[tuned.Place]) -> list[Row]:
        weight = target.make(self.meter.device)
        (rows, columns), packets = weight.shape, weight.values.numel() // PACKET_VALUES
        numbers = (rows, columns, packets, weight.max_packets, weight.tile_words)
        plans: dict[int, dict[tuned.Choice, SpmmPlan]] = {}
        for n in sorted({rows_in_a_pass(n, columns) for n in ns}, reverse=True):
            found = tuned.candidates(self.gpu, numbers, n, weight.dtype == torch.bfloat16)
            place = tuned.place_of(numbers, n, next(iter(found.values())))
            if place not in seen:
                seen.add(place)
                plans[n] = found
        self.compile([plan for found in plans.values() for plan in found.values()])
        weights = timing.rotated(weight, functools.partial(clone, weight)) if plans else []
        return [self._row(target.name, weights, numbers, n, found) for n, found in sorted(plans.items())]

    def _row(
        self,
        name: str,
        weights: list[PackedWeight],
        numbers: tuned.Weight,
        n: int,
        plans: dict[tuned.Choice, SpmmPlan],
    ) -> Row:
        """The quickest of ``plans``, of which the first is the usual one."""
        weight = weights[0]
        generator = torch.Generator(self.meter.device).manual_seed(n)
        x = torch.randn(n, weight.shape[1], generator=generator, device=self.meter.device, dtype=weight.dtype)
        usual = next(iter(plans))
        expected = self.multiply(x, weight, plans[usual]).float()
        times: dict[tuned.Choice, float] = {}
        for choice, plan in plans.items():
            _check(self.multiply(x, weight, plan), expected, f"{name}, n={n}, warps and blocks {choice}")
            times[choice] = self._time(x, weights, plan)
        best = min(times, key=lambda choice: times[choice])
        if times[best] > (1 - GAIN) * times[usual]:
            best = usual
        return {
            "kernel": self.kernel,
            **dict(zip(tuned.PLACE, tuned.place_of(numbers, n, plans[usual]), strict=True)),
            "warps": best[0],
            "resident": best[1],
            "name": name,
            "n": n,
            "sparsity": weight.sparsity,
            "us": times[best],
            "usual": list(usual),
            "usual_us": times[usual],
        }

    def _time(self, x: Tensor, weights: list[PackedWeight], plan: SpmmPlan) -> float:
        return self.meter.graph(
            lambda i: self.multiply(x, weights[i % len(weights)], plan), timing.launches(len(weights))
        )


def _check(y: Tensor, expected: Tensor, what: str) -> None:
    error = float((y.float() - expected).norm()) / (float(expected.norm()) or 1.0)
    if not error <= MAX_ERROR:  # so that NaN counts as wrong
        raise KernelError(
            f"two plans of the sparse kernel differ ({what}: relative error {error:.2g}, more than {MAX_ERROR:g}); "
            f"please report it with what `flash-llm env` prints"
        )


def cuda_tuner(meter: Meter, kernel: str) -> Tuner:
    """The tuner of torch's current CUDA device."""
    from flash_llm.kernels import choice, cuda, launch

    device = meter.device.index
    arch = launch.architecture(device)
    return Tuner(
        meter,
        choice.seen_as(cuda.device_properties(device), kernel),
        kernel,
        cuda.multiply,
        lambda plans: wait(ahead.begin({(plan.source, plan.defines, arch) for plan in plans})),
    )


def keep(rows: list[Row], meter: Meter) -> Path:
    """Keeps what was found, and takes it from now on. Returns the file."""
    from flash_llm.kernels import cuda

    file = tuned.keep(rows, meter.device.index)
    cuda.forget_plans()
    return file
