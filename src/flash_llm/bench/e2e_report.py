"""Tables, CSV and plots of ``flash-llm bench e2e``, from its report alone: see ``e2e.measure``."""

from __future__ import annotations

import csv
import io
import json
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table

from flash_llm.bench.e2e import LARGEST
from flash_llm.files import write_whole
from flash_llm.plotting import png, require_plot

Report = dict[str, Any]
Row = dict[str, Any]

COLUMNS = (  # of the table: title, and the cell of a row
    ("weights", lambda row: label(row["weights"])),
    ("GPUs", lambda row: str(row["gpus"])),
    ("batch", lambda row: str(row["batch"])),
    ("input", lambda row: str(row["input_len"])),
    ("output", lambda row: str(row["output_len"])),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:.0f}"),
    ("tokens/GPU-s", lambda row: f"{row['tokens_per_gpu_second']:.0f}"),
    ("first token, ms", lambda row: f"{row['time_to_first_token_ms']:.0f}"),
    ("token, ms", lambda row: f"{row['time_per_output_token_ms']:.2f}"),
    ("weights, GiB/GPU", lambda row: f"{row['weight_bytes'] / 2**30:.1f}"),
    ("KV cache, tokens", lambda row: f"{row['kv_cache_tokens']:,}"),
    ("largest batch", lambda row: str(row["largest_batch"])),
    ("load, GB/s", lambda row: f"{rate:.1f}" if (rate := row.get("load_gigabytes_a_second")) else "-"),
)
KINDS = ("linear", "attention", "communication", "other")


def label(kind: str) -> str:
    """A kind of weights in words."""
    share, plus, values = kind.partition("+")
    try:
        return f"{float(share):.0%} zeros{plus and ', '}{values}"
    except ValueError:
        return kind.rstrip("/").rsplit("/", 1)[-1]


def read(path: Path) -> Report | None:
    """The report of ``flash-llm bench e2e`` in a file, or None if it holds something else.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None
    settings = report.get("settings") if isinstance(report, dict) else None
    return report if isinstance(settings, dict) and "model" in settings and "results" in report else None


def join(first: Report, paths: list[Path]) -> Report:
    """The first file's report with the results of all the others, and what none of them measured.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one is no such report, or of another model or GPU than the first.
    """
    notes = [(note, first["settings"]) for note in first["not_measured"]]
    for path in paths[1:]:
        other = read(path)
        if other is None:
            raise ValueError(f"{path} is no e2e.json of `flash-llm bench e2e`, and {paths[0]} is one: give one kind")
        for part, key in (("settings", "model"), ("environment", "gpu")):
            if other[part].get(key) != first[part].get(key):
                raise ValueError(
                    f"{path} has {key} {other[part].get(key)!r}, and {paths[0]} {first[part].get(key)!r}: "
                    f"show them one by one"
                )
        first["results"] += other["results"]
        notes += [(note, other["settings"]) for note in other["not_measured"]]
    first["not_measured"] = [note for note, settings in notes if not _measured(note, settings, first["results"])]
    return first


def _measured(note: Row, settings: Row, results: list[Row]) -> bool:
    """Whether there are results of what a note says was not measured: a batch, or else all that its run was to."""
    sizes = set()
    for row in results:
        if (row["weights"], row["gpus"]) == (note["weights"], settings["gpus"]):
            sizes.add((str(row["batch"]), row["input_len"]))
            if row["batch"] == row["largest_batch"]:
                sizes.add((LARGEST, row["input_len"]))
    if "batch" in note:
        return (str(note["batch"]), note["input_len"]) in sizes
    return sizes.issuperset(product(settings["batches"], settings["input_lens"]))


def lines(report: Report) -> list[list[str]]:
    """The table's cells, row by row."""
    return [[cell(row) for _, cell in COLUMNS] for row in report["results"]]


def table(report: Report) -> Table:
    """The table for a terminal."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for i, (title, _) in enumerate(COLUMNS):
        made.add_column(title, justify="right" if i else "left", no_wrap=True)
    for line in lines(report):
        made.add_row(*line)
    return made


def markdown(report: Report) -> str:
    """The table for a page, and what was not measured."""
    rows = [[title for title, _ in COLUMNS], ["---"] * len(COLUMNS), *lines(report)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([text, *remarks(report)]) + "\n"


def remarks(report: Report) -> list[str]:
    """What was not measured, and why."""
    notes = []
    for row in report["not_measured"]:
        batch = f", batch {row['batch']}, input {row['input_len']}" if "batch" in row else ""
        notes.append(f"Not measured: {label(row['weights'])}{batch}: {row['why']}.")
    return notes


def csv_text(report: Report) -> str:
    """A line for every result; a breakdown in columns of its own, such as ``linear_us``."""
    rows = []
    for row in report["results"]:
        plain = {name: value for name, value in row.items() if name != "breakdown_us"}
        rows.append(plain | {f"{kind}_us": us for kind, us in row.get("breakdown_us", {}).items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(report: Report, folder: Path, *, with_plot: bool = False) -> list[Path]:
    """Writes e2e.json, e2e.csv and, if asked, e2e.png into a folder. Returns their paths."""
    files = {
        folder / "e2e.json": (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(),
        folder / "e2e.csv": csv_text(report).encode(),
    }
    if with_plot and report["results"]:
        files[folder / "e2e.png"] = plot(report)
    for path, content in files.items():
        write_whole(path, content)
    return list(files)


def plot(report: Report) -> bytes:
    """A PNG: tokens per GPU-second over batch, and where measured what a decode step's time goes into.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the report has no results.
    """
    require_plot()
    from matplotlib.figure import Figure

    if not report["results"]:
        raise ValueError("the report has no results to plot")
    broken_down = [row for row in report["results"] if row.get("breakdown_us")]
    figure = Figure(figsize=(13 if broken_down else 7, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if broken_down else 1, squeeze=False)[0]
    _draw_rates(panels[0], report["results"])
    if broken_down:
        _draw_breakdown(panels[1], broken_down)
    settings = report["settings"]
    figure.suptitle(f"{settings['model']}, {report['environment'].get('gpu') or 'no GPU'}", x=0.01, ha="left")
    return png(figure)


def _draw_rates(panel: Any, results: list[Row]) -> None:
    several = len({row["input_len"] for row in results}) > 1
    curves: dict[str, list[Row]] = {}
    for row in results:
        name = label(row["weights"]) + (f", input {row['input_len']}" if several else "")
        curves.setdefault(name, []).append(row)
    for name, rows in curves.items():
        rows = sorted(rows, key=lambda row: row["batch"])
        panel.plot([r["batch"] for r in rows], [r["tokens_per_gpu_second"] for r in rows], marker="o", label=name)
    ticks = _apart(sorted({row["batch"] for row in results}))
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("batch")
    panel.set_ylabel("tokens per GPU-second")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def _apart(batches: list[int]) -> list[int]:
    """Those of ascending batches whose numbers don't run into each other on a logarithmic axis."""
    kept = batches[:1]
    for batch in batches:
        if batch >= 1.09 * kept[-1]:
            kept.append(batch)
    return kept


def _draw_breakdown(panel: Any, results: list[Row]) -> None:
    names = [f"{label(row['weights'])}\nbatch {row['batch']}" for row in results]
    bottom = [0.0] * len(results)
    for kind in KINDS:
        heights = [row["breakdown_us"].get(kind, 0.0) * 1e-3 for row in results]
        panel.bar(range(len(results)), heights, bottom=bottom, label=kind)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    panel.set_xticks(range(len(results)), names, fontsize=7, rotation=90 if len(names) > 6 else 0)
    panel.set_ylabel("kernel time of a decode step, ms")
    panel.legend(frameon=False)
