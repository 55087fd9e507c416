"""Reports of benchmarks: geometric means, tables, CSV, plots. All of it from the JSON alone, without a GPU or torch.

A report is a dictionary: ``environment``, ``read_bandwidth``, ``not_measured``, ``means``, and ``results``, a row for
every shape, sparsity and n.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from flash_llm.files import write_whole
from flash_llm.plotting import png, require_plot

Report = dict[str, Any]
Row = dict[str, Any]

_REPORT_KEYS = ("environment", "means", "results")
_ROW_KEYS = ("rows", "columns", "sparsity", "n", "us", "dense_us", "speedup", "bandwidth_share")
_PEER_TITLES = {"csr": "CSR (cuSPARSE)", "two_of_four_csr": "2:4 and CSR"}
_PEER_MARKERS = {"csr": "x", "two_of_four_csr": "+"}


def means(results: list[Row]) -> list[Row]:
    """Geometric means over the shapes, for every sparsity and n.

    Returns:
        Rows of ``sparsity``, ``n``, ``shapes`` (how many), ``speedup`` (dense time over ours), ``bandwidth_share``
        (bytes moved in our time over the measured read bandwidth) and, where peers were measured, ``peers``: for each
        that did not refuse, ``shapes`` and ``speedup``.
    """
    table = []
    for sparsity, n in sorted({(row["sparsity"], row["n"]) for row in results}):
        cases = [row for row in results if (row["sparsity"], row["n"]) == (sparsity, n)]
        mean: Row = {"sparsity": sparsity, "n": n, "shapes": len(cases)}
        for name in ("speedup", "bandwidth_share"):
            mean[name] = statistics.geometric_mean(row[name] for row in cases)
        if any("peers" in row for row in cases):
            mean["peers"] = _peer_means(cases)
        table.append(mean)
    return table


def _peer_means(cases: list[Row]) -> dict[str, Row]:
    speedups: dict[str, list[float]] = {}
    for row in cases:
        for name, peer in row.get("peers", {}).items():
            if "speedup" in peer:
                speedups.setdefault(name, []).append(peer["speedup"])
    return {
        name: {"shapes": len(values), "speedup": statistics.geometric_mean(values)} for name, values in speedups.items()
    }


@dataclass(frozen=True)
class Grid:
    """A table: what stands at its head, and a row of words for every line."""

    head: list[str]
    lines: list[list[str]]


def grids(report: Report) -> list[Grid]:
    """The means of ours, of each peer, and the single cases: "speed-up (share of bandwidth)" for every sparsity."""
    table, results = report["means"], report["results"]
    sparsities = sorted({row["sparsity"] for row in results})
    heads = [f"{round(100 * sparsity, 4):g}%" for sparsity in sparsities]
    ns = sorted({row["n"] for row in table})

    def grid(title: str, lines: Iterable[tuple[str, dict[float, str]]]) -> Grid:
        return Grid([title, *heads], [[label, *(cells.get(s, "-") for s in sparsities)] for label, cells in lines])

    kernel = report["environment"].get("kernel") or "auto"
    title = "geometric mean" if kernel == "auto" else f"geometric mean, {kernel} kernel"
    made = [grid(title, ((f"N = {n}", _cells(row for row in table if row["n"] == n)) for n in ns))]
    for peer in sorted({name for row in table for name in row.get("peers", {})}):
        title = f"{_PEER_TITLES.get(peer, peer)}, geometric mean"
        made.append(grid(title, ((f"N = {n}", _peer_cells(table, n, peer)) for n in ns)))
    cases = sorted({(row["rows"], row["columns"], row["n"]) for row in results})
    of_case = {case: [row for row in results if (row["rows"], row["columns"], row["n"]) == case] for case in cases}
    lines = ((f"{rows}x{columns}, {n}", _cells(of_case[rows, columns, n])) for rows, columns, n in cases)
    return [*made, grid("rows x columns, N", lines)]


def _cells(rows: Iterable[Row]) -> dict[float, str]:
    return {row["sparsity"]: f"{row['speedup']:.2f} ({row['bandwidth_share']:.0%})" for row in rows}


def _peer_cells(table: list[Row], n: int, peer: str) -> dict[float, str]:
    rows = [row for row in table if row["n"] == n and peer in row.get("peers", {})]
    return {row["sparsity"]: f"{row['peers'][peer]['speedup']:.2f}" for row in rows}


def remarks(report: Report) -> list[str]:
    """What must be known beside the tables: the worst error, who refused, what was not measured."""
    lines = []
    errors = [row["relative_error"] for row in report["results"] if row.get("relative_error") is not None]
    if errors:
        lines.append(f"Relative error against float32: {max(errors):.1e} at most.")
    for peer, reasons in _refusals(report["results"]).items():
        lines.append(f"{_PEER_TITLES.get(peer, peer)} refused {len(reasons)} of {len(report['results'])}: {reasons[0]}")
    for case in report.get("not_measured", []):
        lines.append(f"Not measured: {case['rows']}x{case['columns']} at {case['sparsity']:.0%}, {case['why']}.")
    return lines


def _refusals(results: list[Row]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for row in results:
        for name, peer in row.get("peers", {}).items():
            if "refused" in peer:
                reasons.setdefault(name, []).append(peer["refused"])
    return reasons


def markdown(report: Report) -> str:
    """The tables and remarks for a page."""
    blocks = []
    for grid in grids(report):
        rule = "|" + "---|" * len(grid.head)
        blocks.append("\n".join([_line(grid.head), rule, *map(_line, grid.lines)]))
    if notes := remarks(report):
        blocks.append("\n\n".join(notes))
    return "\n\n".join(blocks) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables(report: Report) -> list[Table]:
    """The tables for a terminal."""
    made = []
    for grid in grids(report):
        table = Table(box=None, header_style="bold", pad_edge=False)
        for i, title in enumerate(grid.head):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for line in grid.lines:
            table.add_row(*line)
        made.append(table)
    return made


def summary(report: Report) -> str:
    """One line of what was measured, and on what: GPU, versions, bandwidth, kernel."""
    where = report["environment"]
    words = [str(where.get("gpu") or "no GPU")]
    words += [f"{name} {where[name]}" for name in ("driver", "torch", "cuda", "flash_llm") if where.get(name)]
    if report.get("read_bandwidth"):
        words.append(f"reads {report['read_bandwidth'] * 1e-12:.2f} TB/s")
    if kernel := where.get("kernel"):
        sources = sorted({row["kernel"] for row in report["results"] if "kernel" in row})
        words.append(f"{kernel} kernel" + (f" ({', '.join(sources)})" if sources else ""))
    return ", ".join(words)


def csv_text(report: Report) -> str:
    """A line for every result; a peer's figures in columns of its own, such as ``csr_us`` and ``csr_refused``."""
    rows = [_flat(row) for row in report["results"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Row) -> Row:
    plain = {name: value for name, value in row.items() if name != "peers"}
    peers = row.get("peers", {})
    return plain | {f"{peer}_{name}": value for peer, figures in peers.items() for name, value in figures.items()}


def read(path: Path) -> Report:
    """A report from its JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}): give the kernels.json of `flash-llm bench kernels`") from None
    lacking = [key for key in _REPORT_KEYS if not isinstance(report, dict) or key not in report]
    rows = [] if lacking else report["results"]
    lacking += sorted({key for row in rows for key in _ROW_KEYS if key not in row})
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: give the kernels.json of `flash-llm bench kernels`")
    return report


def write(report: Report, folder: Path, *, with_plot: bool) -> list[Path]:
    """Writes kernels.json, kernels.csv and, if asked, kernels.png into a folder. Returns their paths."""
    files = {
        folder / "kernels.json": (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(),
        folder / "kernels.csv": csv_text(report).encode(),
    }
    for path, content in files.items():
        write_whole(path, content)
    if with_plot and report["results"]:
        write_whole(folder / "kernels.png", plot(report))
        return [*files, folder / "kernels.png"]
    return list(files)


def plot(report: Report) -> bytes:
    """A PNG: speed-up over dense, a panel for every n, a group of bars for every shape, a bar for every sparsity.

    Peers' speed-ups are marks on the bars.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the report has no results.
    """
    require_plot()
    from matplotlib.figure import Figure

    results = report["results"]
    if not results:
        raise ValueError("the report has no results to plot")
    shapes = list(dict.fromkeys((row["rows"], row["columns"]) for row in results))
    ns = sorted({row["n"] for row in results})
    figure = Figure(figsize=(max(6.0, 1.2 * len(shapes)), 2.6 * len(ns) + 1), layout="constrained")
    panels = figure.subplots(len(ns), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, n in zip(panels, ns, strict=True):
        _draw(panel, [row for row in results if row["n"] == n], shapes, sorted({row["sparsity"] for row in results}))
        panel.set_title(f"N = {n}", loc="left")
        panel.set_ylabel("speed-up over dense")
    panels[-1].set_xticks(range(len(shapes)), [f"{rows}\n× {columns}" for rows, columns in shapes])
    panels[-1].set_xlabel("weight: rows × columns")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(str(report["environment"].get("gpu") or ""), x=0.01, ha="left")
    return png(figure)


def _draw(panel: Any, results: list[Row], shapes: list[tuple[int, int]], sparsities: list[float]) -> None:
    """One panel's bars and marks."""
    from matplotlib import colormaps

    width = 0.8 / len(sparsities)
    for i, sparsity in enumerate(sparsities):
        rows = [row for row in results if row["sparsity"] == sparsity]
        at = [shapes.index((row["rows"], row["columns"])) + (i - (len(sparsities) - 1) / 2) * width for row in rows]
        color = colormaps["viridis"](0.9 - 0.8 * i / max(1, len(sparsities) - 1))
        panel.bar(
            at, [row["speedup"] for row in rows], width, color=color, label=f"{round(100 * sparsity, 4):g}% zeros"
        )
        for peer, marker in _PEER_MARKERS.items():
            points = [(x, row["peers"][peer]["speedup"]) for x, row in zip(at, rows, strict=True) if _ran(row, peer)]
            if points:
                label = _PEER_TITLES[peer] if i == 0 else None
                panel.scatter(*zip(*points, strict=True), s=14, marker=marker, color="black", lw=0.8, label=label)
    panel.axhline(1, color="black", lw=0.8, ls="--")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.set_xlim(-0.6, len(shapes) - 0.4)


def _ran(row: Row, peer: str) -> bool:
    return "speedup" in row.get("peers", {}).get(peer, {})
