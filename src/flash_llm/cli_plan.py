"""``flash-llm plan MODEL``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from flash_llm.capacity.roofline import Rates


def plan(
    model: Annotated[str, typer.Argument(help="Model folder (config.json is enough), or a name such as llama-3-70b.")],
    gpu: Annotated[
        str | None,
        typer.Option(help="Such as h100-sxm, a100-80gb, l40s, rtx-4090. Default: the one that was measured here."),
    ] = None,
    sparsity: Annotated[
        str, typer.Option(help="Shares of zeros; with +8bit, nonzeros of 8 bits.")
    ] = "0.5,0.6,0.7,0.8,0.5+8bit,0.6+8bit,0.7+8bit",
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    batch: Annotated[str, typer.Option(help="Sequences at a time to tell speeds for.")] = "1,8,16,32,64,128,256",
    gpus: Annotated[
        int | None, typer.Option(help="GPUs that share the model.", show_default="as few as hold it")
    ] = None,
    max_gpus: Annotated[int, typer.Option(help="Not more than so many.")] = 8,
    memory_share: Annotated[float, typer.Option(help="Share of a GPU's memory that may be used.")] = 0.9,
    machine: Annotated[
        Path | None,
        typer.Option(
            help="Take the GPU's figures from a file of `flash-llm bench machine`. Default: the one kept here."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to write: tokens per GPU-second over batch.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict on how many GPUs a model fits, and how fast: dense, FP8, INT4, sparse, and sparse in 8 bits side by side.

    A roofline from the model's config alone; docs/hardware.md holds it against measurements.

    \b
    Examples:
      flash-llm plan opt-66b --gpu h100-sxm
      flash-llm plan MODEL --gpu a100-80gb --sparsity 0.6 --input-len 2048 --output-len 512
      flash-llm plan opt-30b --gpu h100-sxm --sparsity 0.6,0.6+8bit
      flash-llm plan llama-3-70b --gpu h100-sxm --json --plot llama.png
    """
    from flash_llm.bench.shapes import parse_ns
    from flash_llm.capacity import report
    from flash_llm.capacity.models import load_model
    from flash_llm.capacity.plan import Workload, make_plan
    from flash_llm.capacity.sizes import formats
    from flash_llm.files import write_whole
    from flash_llm.plotting import require_plot

    if plot is not None:
        require_plot()
    workload = Workload(input_len, output_len, tuple(parse_ns(batch)), gpus, max_gpus, memory_share)
    forms = formats(sparsity.split(","))
    on = _rates(gpu, machine)
    made = make_plan(load_model(model), on, forms, workload)
    if plot is not None:
        write_whole(plot, report.plot(made))
        print(f"wrote {plot}", file=sys.stderr, flush=True)
    if json_:
        print(json.dumps(made.to_dict(), indent=2, allow_nan=False))
        return
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for line in report.summary(made):
        console.print(line, highlight=False, markup=False)
    for table in (report.memory_table(made), report.speed_table(made)):
        console.print()
        console.print(table)
    console.print()
    for line in report.remarks(made):
        console.print(line, highlight=False, markup=False)


def _rates(name: str | None, file: Path | None) -> Rates:
    """Of the GPU asked for, with measured figures where there are any of it."""
    from flash_llm.capacity.gpus import GPUS, find_gpu, machine_file, read_machine
    from flash_llm.capacity.roofline import rates

    machine = None
    if file is not None or machine_file().is_file():
        machine = read_machine(file or machine_file())
    if name is None and machine is None:
        raise ValueError(
            f"which GPU? Add --gpu with one of {', '.join(GPUS)}; or run `flash-llm bench machine` on yours"
        )
    if name is None and machine is not None:
        return rates(machine.published(), machine)
    gpu = find_gpu(name or "")
    if machine is None or machine.published() is gpu:
        return rates(gpu, machine)
    if file is not None:
        raise ValueError(f"{file} measures {machine.gpu!r}, not {gpu.name}: leave out --gpu, or --machine")
    return rates(gpu)
