"""Reports of benchmarks: geometric means, tables, CSV. All of it from the JSON alone, without a GPU or torch.

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

from rich.table import Table

from flash_llm.bench import plots
from flash_llm.bench.plots import PEER_TITLES, Report, Row, zeros
from flash_llm.files import write_whole

_REPORT_KEYS = ("environment", "means", "results")
_ROW_KEYS = ("rows", "columns", "sparsity", "n", "us", "dense_us", "speedup", "bandwidth_share")


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
    heads = [zeros(sparsity) for sparsity in sparsities]
    ns = sorted({row["n"] for row in table})

    def grid(title: str, lines: Iterable[tuple[str, dict[float, str]]]) -> Grid:
        return Grid([title, *heads], [[label, *(cells.get(s, "-") for s in sparsities)] for label, cells in lines])

    kernel = report["environment"].get("kernel") or "auto"
    title = "geometric mean" if kernel == "auto" else f"geometric mean, {kernel} kernel"
    made = [grid(title, ((f"N = {n}", _cells(row for row in table if row["n"] == n)) for n in ns))]
    for peer in sorted({name for row in table for name in row.get("peers", {})}):
        title = f"{PEER_TITLES.get(peer, peer)}, geometric mean"
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
    if watched := [row for row in report["results"] if "sm_mhz" in row]:
        clocks, watts = [row["sm_mhz"] for row in watched], max(row["watts"] for row in watched)
        clock = f"the clock was {min(clocks):.0f} to {max(clocks):.0f} MHz"
        lines.append(f"During the sparse products {clock}, and power {watts:.0f} W at most.")
    for peer, reasons in _refusals(report["results"]).items():
        lines.append(f"{PEER_TITLES.get(peer, peer)} refused {len(reasons)} of {len(report['results'])}: {reasons[0]}")
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
    """The tables for a page, then what was measured and the remarks."""
    blocks = []
    for grid in grids(report):
        rule = "|" + "---|" * len(grid.head)
        blocks.append("\n".join([_line(grid.head), rule, *map(_line, grid.lines)]))
    return "\n\n".join([*blocks, f"Measured on {summary(report)}.", *remarks(report)]) + "\n"


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
    """One line of what was measured, and on what: GPU, versions, bandwidth, date, kernel."""
    where = report["environment"]
    words = [str(where.get("gpu") or "no GPU")]
    words += [f"{name} {where[name]}" for name in ("driver", "torch", "cuda", "flash_llm") if where.get(name)]
    if report.get("read_bandwidth"):
        words.append(f"reads {report['read_bandwidth'] * 1e-12:.2f} TB/s")
    if where.get("date"):
        words.append(where["date"])
    if kernel := where.get("kernel"):
        sources = sorted({row["kernel"] for row in report["results"] if "kernel" in row})
        words.append(f"{kernel} kernel" + (f" ({', '.join(sources)})" if sources else ""))
    if where.get("tuned_plans"):
        words.append(f"{where['tuned_plans']} tuned plans")
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


def write(report: Report, folder: Path, *, with_plots: bool) -> list[Path]:
    """Writes kernels.json, kernels.csv and, if asked, the plots that suit the report. Returns their paths."""
    files = {
        folder / "kernels.json": (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(),
        folder / "kernels.csv": csv_text(report).encode(),
    }
    if with_plots:
        files |= {folder / name: draw(report) for name, draw in plots.suited(report).items()}
    for path, content in files.items():
        write_whole(path, content)
    return list(files)
