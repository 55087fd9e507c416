"""``flash-llm tune``."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flash_llm.kernels import choice
from flash_llm.progress import progress_bar

if TYPE_CHECKING:
    from flash_llm.bench.tune import Target


def tune(
    model: Annotated[
        str | None, typer.Argument(help="Compressed model folder, or a name such as llama-3-8b for random weights.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="In place of a model: names as of `flash-llm bench kernels`, or ROWSxCOLUMNS.", show_default="sweep"
        ),
    ] = None,
    sparsity: Annotated[str, typer.Option(help="Shares of zeros of random weights.")] = "0.5,0.6,0.7,0.8",
    n: Annotated[str, typer.Option("--n", help="Rows of x, up to 1024.")] = "8,16,32,64,128,192,256",
    kernel: Annotated[
        str, typer.Option(envvar=choice.VARIABLE, help="The kernel to tune: see `flash-llm bench kernels`.")
    ] = choice.AUTO,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which no further weight is begun.", show_default="none")
    ] = math.inf,
) -> None:
    """Find the quickest plan of the sparse kernel for a model's weights on this GPU, and use it from then on.

    Plans differ in warps and in blocks that share a multiprocessor. What is found is kept in the
    folder of compiled kernels, for GPUs of this name, and `flash-llm env` says so. To go back,
    remove that file. Results of different plans differ by rounding.

    \b
    Examples:
      flash-llm tune SMALL
      flash-llm tune llama-3-8b --sparsity 0.6 --n 8,16
      flash-llm tune --shapes 4096x4096,14336x4096 --time-limit 120
    """
    from flash_llm.bench.shapes import parse_ns, parse_shapes, parse_sparsities
    from flash_llm.bench.timing import CudaMeter
    from flash_llm.bench.tune import cuda_tuner, keep, model_targets, random_targets

    if model is not None and shapes is not None:
        raise ValueError(f"{model} and --shapes {shapes}: give one of them")
    if not time_limit > 0:
        raise ValueError(f"time limit {time_limit}: it takes seconds, more than 0")
    ns, shares, kernel = parse_ns(n), parse_sparsities(sparsity), choice.check(kernel)
    meter = CudaMeter()
    targets = random_targets(parse_shapes(shapes or "sweep"), shares) if model is None else model_targets(model, shares)
    tuner = cuda_tuner(meter, kernel)
    found: list[dict[str, Any]] = []
    left = list(targets)
    with progress_bar(transient=True) as bar:
        task = bar.add_task("tuning", total=len(targets))
        for target, rows in tuner.tune(targets, ns, time_limit=time_limit):
            left.remove(target)
            if rows:
                found += rows
                file = keep(rows, meter)
            bar.update(task, advance=1, description=target.name)
    _print(found, left, time_limit)
    if found:
        print(f"wrote {file}", file=sys.stderr, flush=True)


def _print(rows: list[dict[str, Any]], left: list[Target], time_limit: float) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, title in enumerate(("weight", "zeros", "N", "usual plan", "us", "quickest", "us", "gain")):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        usual = "{} x {}".format(*row["usual"])
        quickest = f"{row['warps']} x {row['resident']}"
        table.add_row(
            f"{row['rows']}x{row['columns']}",
            f"{row['sparsity']:.0%}",
            str(row["n"]),
            usual,
            f"{row['usual_us']:.1f}",
            "the same" if quickest == usual else quickest,
            f"{row['us']:.1f}",
            f"{row['usual_us'] / row['us'] - 1:.0%}",
        )
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    console.print("Plans: warps of a block x blocks that share a multiprocessor.", highlight=False)
    for target in left:
        line = f"Not tuned: {target.name}, the time limit of {time_limit:g} s."
        console.print(line, highlight=False, markup=False)
