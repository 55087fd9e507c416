"""``flash-llm bench VERB``: measure, and show what was measured."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flash_llm.cli_options import Values
from flash_llm.files import make_free
from flash_llm.kernels import choice
from flash_llm.plotting import can_plot, require_plot
from flash_llm.progress import progress_bar

if TYPE_CHECKING:
    from flash_llm.bench.kernels import Settings
    from flash_llm.bench.report import Report

FILES = ("kernels.json", "kernels.csv", "kernels.png", "kernels-n.png")
NS = "1,8,16,32,64"
Verb = Callable[..., None]


class Dtype(str, Enum):
    """Floating-point types that weights are packed in."""

    float16 = "float16"
    bfloat16 = "bfloat16"


def make_app(guard: Callable[[Verb], Verb]) -> typer.Typer:
    """The group of verbs; ``guard`` makes an exception a line and an exit code, as for every other verb."""
    app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure speed, and make tables and plots.")
    for verb in (kernels, machine, e2e, report):
        app.command(name=verb.__name__)(guard(verb))
    return app


def kernels(
    shapes: Annotated[
        str | None,
        typer.Option(
            help="paper (OPT-30B, 66B, 175B), llama-3-8b, llama-3-70b, qwen2.5-7b, qwen2.5-72b, sweep (three), "
            "ROWSxCOLUMNS, or several of them with commas between.",
            show_default="paper, or sweep with --n-sweep",
        ),
    ] = None,
    sparsity: Annotated[str, typer.Option(help="Shares of zeros.")] = "0.5,0.6,0.7,0.8,0.9",
    n: Annotated[str | None, typer.Option("--n", help="Rows of x: tokens multiplied at once.", show_default=NS)] = None,
    n_sweep: Annotated[
        bool, typer.Option("--n-sweep", help="In place of --n: 1 to 8192 rows of x in 19 steps.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and x.")] = Dtype.float16,
    values: Annotated[Values, typer.Option(help="How the packed weights' nonzeros are stored.")] = Values.bits16,
    kernel: Annotated[
        str,
        typer.Option(
            envvar=choice.VARIABLE,
            help="auto: this GPU's own. portable: the one for every GPU. portable-99kb: the same as small GPUs run it.",
        ),
    ] = choice.AUTO,
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure torch's own sparse formats too: CSR, and 2:4 with a CSR rest.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for kernels.json, kernels.csv and plots.")
    ] = None,
    plot: Annotated[
        bool | None,
        typer.Option(
            "--plot/--no-plot",
            help="Make kernels.png, and with three or more N kernels-n.png. Default: if matplotlib is there.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every result with float32's.")] = True,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which no further weight is begun.", show_default="none")
    ] = math.inf,
) -> None:
    """Measure the sparse kernel beside the best dense product of torch, on this GPU.

    Dense is F.linear or torch.mm(W, X^T), the quicker, in the same run. Times are medians of
    CUDA graphs that go through 400 MB of weights, more than an L2 cache holds; one takes some
    0.2 s at most. --n-sweep shows where the sparse kernel stops being worth it, in kernels-n.png.
    Files in OUT are written anew whenever a weight has been measured.

    \b
    Examples:
      flash-llm bench kernels --out results
      flash-llm bench kernels --shapes llama-3-8b --n 1,16 --peers --out results
      flash-llm bench kernels --values fp8 --sparsity 0.5,0.6,0.7 --out results-fp8
      flash-llm bench kernels --n-sweep --sparsity 0.6,0.8 --out results-n
      flash-llm bench kernels --shapes 4096x4096,14336x4096 --sparsity 0.7 --time-limit 60
      flash-llm bench kernels --kernel portable --out results-portable
    """
    from flash_llm.bench.report import write
    from flash_llm.bench.shapes import N_SWEEP
    from flash_llm.bench.timing import CudaMeter

    if n is not None and n_sweep:
        raise ValueError(f"--n {n} and --n-sweep: give one of them")
    shapes = shapes or ("sweep" if n_sweep else "paper")
    n = ",".join(map(str, N_SWEEP)) if n_sweep else n or NS
    settings = _settings(shapes, sparsity, n, dtype.value, values.value, peers, check, time_limit, kernel)
    _check_plot(plot, out)
    meter = CudaMeter(clocks=True)
    if out is not None:
        make_free(out, FILES)
    measured = _measure(settings, meter, out)
    _print(measured)
    if out is not None:
        with_plot = can_plot() if plot is None else plot
        for path in write(measured, out, with_plots=with_plot):
            _say(f"wrote {path}")
        if not with_plot and plot is None:
            _say("no plot: matplotlib isn't installed (pip install 'flash-llm[bench]')")


def machine(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file to write. Default: where `flash-llm plan` finds it.")
    ] = None,
) -> None:
    """Measure this GPU: read bandwidth, matrix rate, cost of a launch. `flash-llm plan` then uses that.

    \b
    Examples:
      flash-llm bench machine
      flash-llm bench machine --out h100.json
      flash-llm plan opt-66b --machine h100.json
    """
    import torch

    from flash_llm.bench.machine import measure
    from flash_llm.bench.timing import CudaMeter
    from flash_llm.capacity.gpus import machine_file
    from flash_llm.files import write_json

    meter = CudaMeter()
    measured = measure(meter, torch.cuda.get_device_properties(meter.device), command=_command())
    path = out or machine_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, measured)
    print(
        f"{measured['gpu']}: reads {measured['read_bandwidth'] * 1e-12:.2f} TB/s, multiplies "
        f"{measured['matrix_rate'] * 1e-12:.0f} TFLOP/s in 16 bits, {measured['launch_us']:.2f} us a launch"
    )
    _say(f"wrote {path}")


def e2e(
    model: Annotated[
        str, typer.Option(help="Name of a built-in model, such as opt-30b or llama-3-8b, or a folder with config.json.")
    ],
    weights: Annotated[
        str,
        typer.Option(
            help="Kinds of weights: dense, fp8, int4, shares of zeros such as 0.8 (with nonzeros of 8 bits: 0.8+fp8 or "
            "0.8+int8), or model folders."
        ),
    ] = "dense,0.5,0.6,0.7,0.8",
    batch: Annotated[str, typer.Option(help='Requests at a time; "max": as many as fit.')] = "8,16,64",
    input_len: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "64",
    output_len: Annotated[int, typer.Option(help="Tokens generated.")] = 512,
    gpus: Annotated[int, typer.Option(help="GPUs that share the model: tensor-parallel size.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Of dense weights, and computed in.")] = Dtype.float16,
    memory: Annotated[float, typer.Option(help="Share of a GPU's memory for vLLM.")] = 0.94,
    max_batch: Annotated[int, typer.Option(help='Most requests at a time that "max" stands for.')] = 256,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Also measure what kinds of kernels a decode step's time goes into.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="No compilation, no CUDA graphs: for a quick look.")] = False,
    engine: Annotated[
        str, typer.Option(help="Further options of vllm.LLM, the same for all kinds of weights, as a JSON object.")
    ] = "{}",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for e2e.json, e2e.csv, e2e.png and vLLM's logs.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for everything.", show_default="none")] = math.inf,
) -> None:
    """Measure throughput and latency of whole models in vLLM: dense, quantized and sparse.

    Weights are random unless a folder is named, so that no model need be downloaded; each kind has a
    process of its own. Files in OUT are written anew whenever a row has been measured.

    \b
    Examples:
      flash-llm bench e2e --model opt-30b --weights dense,fp8,int4,0.7,0.8 --out results
      flash-llm bench e2e --model opt-30b --weights fp8,int4,0.5+fp8,0.6+fp8 --out results
      flash-llm bench e2e --model opt-66b --gpus 2 --weights dense,0.8 --batch 8,16,max --breakdown
      flash-llm bench e2e --model MODEL --weights MODEL,SMALL --batch 1 --input-len 1024 --output-len 64
      flash-llm bench e2e --model opt-30b --weights dense,0.8 --batch max --engine '{"kv_cache_dtype": "fp8"}'
    """
    from flash_llm.bench import e2e_report as reports
    from flash_llm.bench.e2e import Settings, measure
    from flash_llm.bench.shapes import parse_ns

    settings = Settings(
        model,
        weights.split(","),
        batch.split(","),
        parse_ns(input_len),
        output_len,
        gpus=gpus,
        dtype=dtype.value,
        memory_share=memory,
        max_batch=max_batch,
        breakdown=breakdown,
        eager=eager,
        engine=_parse_engine(engine),
        time_limit=time_limit,
    )
    if out is not None:
        make_free(out, ("e2e.json", "e2e.csv", "e2e.png"))

    shown = 0

    def on_change(report: Report) -> None:
        nonlocal shown
        if len(report["results"]) > shown:
            shown = len(report["results"])
            last = zip(reports.COLUMNS, reports.lines(report)[-1], strict=True)
            _say(", ".join(f"{title} {cell}" for (title, _), cell in last))
        if out is not None:
            reports.write(report, out)

    measured = measure(settings, command=shlex.join(["flash-llm", *sys.argv[1:]]), log_dir=out, on_change=on_change)
    _print_e2e(measured)
    if out is not None:
        for path in reports.write(measured, out, with_plot=can_plot()):
            _say(f"wrote {path}")
    if not measured["results"]:
        raise typer.Exit(1)


def _parse_engine(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"engine options {text!r} are no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'engine options {text!r}: it takes a JSON object, such as {{"kv_cache_dtype": "fp8"}}')
    return found


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="The kernels.json of a run, or one or more e2e.json of the same model and GPU."
        ),
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file to write: bars of speed-ups, or of e2e.json rates over batch.")
    ] = None,
    plot_n: Annotated[Path | None, typer.Option(help="PNG file to write: times and speed-ups over N.")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
) -> None:
    """Print the tables of a run again, or make its plot, from its JSON file alone.

    \b
    Examples:
      flash-llm bench report results/kernels.json
      flash-llm bench report results/kernels.json --markdown > table.md
      flash-llm bench report results/kernels.json --plot kernels.png
      flash-llm bench report results-n/kernels.json --plot-n kernels-n.png
      flash-llm bench report results/e2e.json results-8-bit/e2e.json --markdown --plot e2e.png
    """
    from flash_llm.bench import e2e_report, plots
    from flash_llm.bench import report as reports
    from flash_llm.files import write_whole

    of_model = e2e_report.read(files[0])
    if of_model is not None:
        if plot_n is not None:
            raise ValueError(f"--plot-n is for kernels.json, and {files[0]} is an e2e.json: --plot draws it")
        read = e2e_report.join(of_model, files)
        csv_text, as_markdown, draw, show = e2e_report.csv_text, e2e_report.markdown, e2e_report.plot, _print_e2e
    else:
        if len(files) > 1:
            raise ValueError(f"{len(files)} files: several are shown together only if all are an e2e.json; give one")
        read = reports.read(files[0])
        csv_text, as_markdown, draw, show = reports.csv_text, reports.markdown, plots.speedups, _print
    if csv is not None:
        write_whole(csv, csv_text(read).encode())
    if plot is not None:
        write_whole(plot, draw(read))
    if plot_n is not None:
        write_whole(plot_n, plots.over_n(read))
    if markdown:
        print(as_markdown(read), end="")
    else:
        show(read)


def _settings(
    shapes: str,
    sparsity: str,
    n: str,
    dtype: str,
    values: str,
    peers: bool,
    check: bool,
    time_limit: float,
    kernel: str,
) -> Settings:
    import torch

    from flash_llm.bench.kernels import Settings
    from flash_llm.bench.shapes import parse_ns, parse_shapes, parse_sparsities

    return Settings(
        parse_shapes(shapes),
        parse_sparsities(sparsity),
        parse_ns(n),
        dtype=getattr(torch, dtype),
        values=values,
        peers=peers,
        check=check,
        time_limit=time_limit,
        kernel=kernel,
    )


def _check_plot(plot: bool | None, out: Path | None) -> None:
    """Says before the run what would else be said after it."""
    if not plot:
        return

    if out is None:
        raise ValueError("--plot needs a folder to write to: add --out DIR")
    require_plot()


def _measure(settings: Settings, meter: object, out: Path | None) -> Report:
    from flash_llm.bench.kernels import measure
    from flash_llm.bench.report import write

    with progress_bar(transient=True) as bar:
        task = bar.add_task("measuring", total=len(settings.shapes) * len(settings.sparsities))

        def on_change(report: Report) -> None:
            last = report["results"][-1:]
            done = [f"{row['rows']}x{row['columns']} at {row['sparsity']:.0%}" for row in last]
            bar.update(task, advance=1, description=done[0] if done else "measuring")
            if out is not None:
                write(report, out, with_plots=False)

        return measure(settings, meter, command=_command(), on_change=on_change)  # type: ignore[arg-type]


def _print(report: Report) -> None:
    from flash_llm.bench.report import remarks, summary, tables

    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(summary(report), highlight=False)
    for table in tables(report):
        console.print()
        console.print(table)
    for remark in remarks(report):
        console.print(remark, highlight=False, markup=False)


def _print_e2e(report: Report) -> None:
    from flash_llm.bench import e2e_report as reports

    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(reports.table(report))
    for remark in reports.remarks(report):
        console.print(remark, highlight=False, markup=False)


def _command() -> str:
    return shlex.join(["flash-llm", *sys.argv[1:]])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
