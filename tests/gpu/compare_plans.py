"""Times plans of the sparse kernel side by side on the GPU at hand, each checked against float32:

    python tests/gpu/compare_plans.py 7168x7168,4096x4096 --sparsity 0.6,0.8 --n 8,64 warps=8 warps=4,resident=2
    python tests/gpu/compare_plans.py 28672x7168 --sparsity 0.7 --n 64,128 tile_words=4 _ADDING_UP=0.5 define:TURNS=1

Beside dense, the usual plan and one more for each variant: a list of changes with commas between them. ``warps``,
``resident`` and ``n_blocks`` of ``plan.spmm_plan``; ``tile_words`` of the packed weight; ``blocks`` that the work is
dealt out to; ``pieces`` of X on Hopper, words and how many of them the ring holds (``pieces=4x2``); a constant of
plan.py (``_NAME=1``); or what the kernel is compiled with (``define:NAME=1``). A ``=`` behind a time says that this
plan was timed already, ``wrong`` that its result is.
"""

from __future__ import annotations

import argparse
import functools
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
from torch import Tensor

from flash_llm.bench import timing
from flash_llm.bench.kernels import clone, relative_error
from flash_llm.bench.shapes import parse_ns, parse_shapes, parse_sparsities
from flash_llm.kernels import ahead, cuda, launch, plan
from flash_llm.tensor import PackedWeight

ARGUMENTS = ("warps", "resident", "n_blocks")
WRONG = 2e-3  # relative error of a result, in float16


@dataclass
class Variant:
    """Changes to the usual plan."""

    tile_words: int | None = None
    blocks: int | None = None
    pieces: tuple[int, int] | None = None
    arguments: dict[str, int] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    defines: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Variant:
        made = cls()
        for change in filter(None, text.split(",")):
            name, _, value = change.partition("=")
            if name in ARGUMENTS:
                made.arguments[name] = int(value)
            elif name in ("tile_words", "blocks"):
                setattr(made, name, int(value))
            elif name == "pieces":
                words, _, stages = value.partition("x")
                made.pieces = int(words), int(stages)
            elif name.startswith("define:"):
                made.defines[name.removeprefix("define:")] = int(value)
            elif isinstance(getattr(plan, name, None), (int, float)):
                made.constants[name] = float(value) if "." in value else int(value)
            else:
                raise ValueError(f"{change!r}: no argument, no number in plan.py, and no define:NAME=1")
        return made

    def plan(self, weight: PackedWeight, n: int) -> plan.SpmmPlan:
        """The plan for n rows of x."""
        packets = weight.values.numel() // weight.kind.packet_values
        sizes = (*weight.shape, packets, weight.max_packets, weight.tile_words, n, weight.dtype == torch.bfloat16)
        device = cuda.device_properties(weight.device.index)
        with patch.dict(vars(plan), self.constants):
            made = plan.spmm_plan(device, *sizes, values=weight.kind, **self.arguments)  # type: ignore[arg-type]
        if self.pieces is not None:
            made = with_pieces(made, *self.pieces)
        if made.shared > device.shared_memory:
            raise ValueError(f"{made.shared} bytes of shared memory")
        if self.blocks is not None:
            larger, late = plan._uneven_shares(made.counted, self.blocks)
            made = replace(made, blocks=self.blocks, larger=larger, late=late)
        return replace(made, defines=tuple(sorted((dict(made.defines) | self.defines).items())))


def with_pieces(made: plan.SpmmPlan, words: int, stages: int) -> plan.SpmmPlan:
    """A plan for Hopper with another ring."""
    defines = dict(made.defines)

    def ring(words: int, stages: int) -> int:
        return stages * plan._stage(defines["N_BLOCKS"], words, True, bool(defines["X8"]))

    shared = made.shared - ring(defines["CHUNK_WORDS"], defines["STAGES"]) + ring(words, stages)
    defines |= {"CHUNK_WORDS": words, "STAGES": stages}
    return replace(made, defines=tuple(sorted(defines.items())), shared=shared)


@dataclass
class Column:
    """A variant of one weight: copies to go through in turn, and the plan for each n, or why there is none."""

    weights: list[PackedWeight]
    plans: dict[int, plan.SpmmPlan | str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes")
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--sparsity", default="0.6,0.8")
    parser.add_argument("--n", default="8,16,32,64")
    parser.add_argument("--values", default="16-bit")
    given = parser.parse_intermixed_args()
    variants = [Variant.parse(text) for text in ["", *given.variants]]
    meter = timing.CudaMeter()
    print(
        torch.cuda.get_device_name(),
        plan.__file__,
        "| dense |",
        " | ".join(["as planned", *given.variants]),
        flush=True,
    )
    torch.manual_seed(0)
    for shape in parse_shapes(given.shapes):
        dense_us = time_dense(meter, shape, parse_ns(given.n))
        for sparsity in parse_sparsities(given.sparsity):
            dense = torch.randn(shape, device="cuda", dtype=torch.float16)
            dense.masked_fill_(torch.rand(shape, device="cuda") < sparsity, 0)
            compare(meter, dense, variants, dense_us, given.values)


def time_dense(meter: timing.CudaMeter, shape: tuple[int, int], ns: list[int]) -> dict[int, float]:
    """Microseconds of ``F.linear`` for each n."""
    weight = torch.randn(shape, device="cuda", dtype=torch.float16)
    weights = timing.rotated(weight, weight.clone)
    found = {}
    for n in ns:
        x = torch.randn(n, shape[1], device="cuda", dtype=weight.dtype)
        run = functools.partial(_linear, x, weights)
        found[n] = meter.graph(run, timing.launches(len(weights)))
    return found


def _linear(x: Tensor, weights: list[Tensor], i: int) -> Tensor:
    return torch.nn.functional.linear(x, weights[i % len(weights)])


def compare(
    meter: timing.CudaMeter, dense: Tensor, variants: list[Variant], dense_us: dict[int, float], values: str
) -> None:
    """Prints a line for each n of ``dense_us``."""
    columns = [column(dense, variant, list(dense_us), values) for variant in variants]
    plans = {one for each in columns for one in each.plans.values() if not isinstance(one, str)}
    arch = launch.architecture(0)
    wait(ahead.begin({(one.source, one.defines, arch) for one in plans}))
    for n, us in dense_us.items():
        x = torch.randn(n, dense.shape[1], device="cuda", dtype=dense.dtype)
        seen: dict[object, str] = {}
        cells = []
        for each in columns:
            key = (each.plans[n], each.weights[0].tile_words)
            cells.append(f"{seen[key]}=" if key in seen else cell(meter, x, each, n))
            seen.setdefault(key, cells[-1])
        zeros = f"{columns[0].weights[0].sparsity:.0%}"
        tile = columns[0].weights[0].tile_words
        what = f"{dense.shape[0]}x{dense.shape[1]} {zeros} N={n:<4} tile {tile:<2}"
        print(" | ".join([what, f"{us:7.2f}", *cells]), flush=True)


def column(dense: Tensor, variant: Variant, ns: list[int], values: str) -> Column:
    """Packs the weight as a variant wants it, and makes its plans."""
    packed = PackedWeight.from_dense(dense, tile_words=variant.tile_words, values=values)
    weights = timing.rotated(packed, functools.partial(clone, packed))
    plans: dict[int, plan.SpmmPlan | str] = {}
    for n in ns:
        try:
            plans[n] = variant.plan(packed, n)
        except (ValueError, KeyError) as error:
            plans[n] = f"- ({error})"
    return Column(weights, plans)


def cell(meter: timing.CudaMeter, x: Tensor, of: Column, n: int) -> str:
    """Microseconds, or why there are none."""
    chosen, weights = of.plans[n], of.weights
    if isinstance(chosen, str):
        return chosen
    stored = weights[0].to_dense(torch.float32)
    error = relative_error(cuda.multiply(x, weights[0], chosen), x, stored)
    us = meter.graph(lambda i: cuda.multiply(x, weights[i % len(weights)], chosen), timing.launches(len(weights)))
    return f"{us:7.2f}" + (" wrong" if not error < WRONG else "")


if __name__ == "__main__":
    main()
