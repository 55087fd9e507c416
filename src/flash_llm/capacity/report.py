"""A plan as tables, and as a plot of tokens per GPU-second over batch."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from flash_llm.capacity.plan import Plan, Row
from flash_llm.plotting import png, require_plot

_GIB = 2**30


def summary(plan: Plan) -> list[str]:
    """What was planned, on what."""
    on, work = plan.rates, plan.workload
    figures = "measured" if on.measured else "published, times shares measured on another GPU"
    if not on.measured and on.decoding == 1:
        figures = "published, times shares measured on one"
    return [
        f"{plan.model}, {plan.parameters / 1e9:.2f} billion parameters, on {on.name}: {on.memory / _GIB:.1f} GiB, "
        f"reads {on.read * 1e-12:.2f} TB/s, {on.matrix * 1e-12:.0f} TFLOP/s ({figures})",
        f"{work.input_len} tokens in, {work.output_len} out; {work.memory_share:.0%} of a GPU's memory may be used",
    ]


def memory_table(plan: Plan) -> Table:
    """Bytes, GPUs and room for each format."""
    head = ("weights", "of dense", "GPUs", "weights a GPU", "KV cache a GPU", "holds", "largest batch")
    return _table(plan, head, (_memory_cells(row) for row in plan.rows))


def _memory_cells(row: Row) -> list[str]:
    cells = [f"{row.weights_bytes / _GIB:.1f} GiB", f"{row.of_dense:.0%}"]
    if row.gpus is None or row.weights_bytes_a_gpu is None or row.cache_bytes_a_token is None:
        return [*cells, *"-----"]
    return [
        *cells,
        str(row.gpus),
        f"{row.weights_bytes_a_gpu / _GIB:.1f} GiB",
        f"{row.cache_bytes_a_token / 1024:.0f} KiB a token",
        f"{row.cache_tokens:,} tokens",
        f"{row.largest_batch:,}",
    ]


def speed_table(plan: Plan) -> Table:
    """Predicted tokens per GPU-second for each format and batch; in brackets the milliseconds of a decode step."""
    batches = plan.workload.batches
    head = (*(f"batch {batch}" for batch in batches), "largest batch")
    return _table(plan, head, (_speed_cells(row, batches) for row in plan.rows))


def _speed_cells(row: Row, batches: tuple[int, ...]) -> list[str]:
    cells = {speed.batch: f"{speed.tokens_per_gpu_second:.0f} ({speed.step_ms:.1f})" for speed in row.speeds}
    return [*(cells.get(batch, "-") for batch in batches), cells.get(row.largest_batch or 0, "-")]


def _table(plan: Plan, head: Iterable[str], lines: Iterable[list[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in head:
        table.add_column(title, justify="right")
    for row, cells in zip(plan.rows, lines, strict=True):
        table.add_row(row.format, *cells)
    return table


def remarks(plan: Plan) -> list[str]:
    """What doesn't fit and why, and what the figures rest on."""
    lines = [f"{row.format}: {row.why}" for row in plan.rows if row.why]
    if plan.stay_dense:
        lines.append(f"{plan.stay_dense} linear layers are of a class of their own: they stay dense in every format.")
    if any("8 bit" in row.format for row in plan.rows):
        lines.append("8-bit values: the kernel is taken to decode as many a second as of 16 bits. Not measured.")
    lines.append("Speeds are predictions, tokens per GPU-second with the milliseconds of a decode step in brackets.")
    if not plan.rates.measured:
        lines.append("`flash-llm bench machine` measures a GPU, and this plan then uses that.")
    return [*lines, *(f"{name}: {basis}" for name, basis in plan.basis.items())]


def plot(plan: Plan) -> bytes:
    """A PNG: tokens per GPU-second over batch, a line for each format, up to its largest batch.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: nothing fits.
    """
    require_plot()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in plan.rows if row.speeds]
    if not rows:
        raise ValueError(f"{plan.model} fits on no allowed number of GPUs in any format: there is nothing to plot")
    sparse = [row for row in rows if row.sparsity is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    for row in rows:
        gpus = f"{row.gpus} GPU{'s' if row.gpus != 1 else ''}"
        color, style = None, "--"
        if row in sparse:
            color, style = colormaps["viridis"](0.9 - 0.8 * sparse.index(row) / max(1, len(sparse) - 1)), "-"
        points = [(speed.batch, speed.tokens_per_gpu_second) for speed in row.speeds]
        panel.plot(*zip(*points, strict=True), style, color=color, marker="o", ms=3, label=f"{row.format}, {gpus}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("batch: sequences at a time")
    panel.set_ylabel("predicted tokens per GPU-second")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize="small")
    work = plan.workload
    title = f"{plan.model} on {plan.rates.name}, {work.input_len} tokens in, {work.output_len} out"
    panel.set_title(title, loc="left")
    return png(figure)
