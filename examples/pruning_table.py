"""Perplexity after pruning, by method, sparsity and allocation: a table as JSON, and a plot of it.

    python examples/pruning_table.py MODEL --calibration text.txt.gz --text wikitext2-test.txt.gz --out table.json
    python examples/pruning_table.py --draw table.json --image perplexity.png [--retrained retrain.json]
    python examples/pruning_table.py --print table.json

A cell that the JSON has already is not measured again, so that a run may be stopped at any time, or given a limit, and
called again. ``--jobs`` measures several cells at a time on one device; then the seconds say little. ``--keep DIR``
keeps the pruned folders; without it each is deleted once it is measured.

A survey's result is used again where it would be the same: OWL's doesn't depend on the method, and ALPS' least-error
curves are SparseGPT's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from flash_llm.compare import load_folder
from flash_llm.environment import environment
from flash_llm.evaluate import load_text, perplexity
from flash_llm.files import write_json
from flash_llm.prune import CalibrationConfig, Given, prune_folder
from flash_llm.prune.allocate import Allocation

Cell = dict[str, Any]
_DENSE = {"method": "dense", "sparsity": 0.0, "allocation": "uniform"}


def main() -> None:
    options = _options()
    if options.draw or options.print:
        table = json.loads((options.draw or options.print).read_text(encoding="utf-8"))
        if options.print:
            print(markdown(table))
        else:
            retrained = json.loads(options.retrained.read_text(encoding="utf-8")) if options.retrained else None
            draw(table, options.image, retrained)
        return
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """Fill in what is missing of the table, until the time is up."""
    end = time.monotonic() + options.minutes * 60
    settings = _settings(options)
    table = {"settings": settings, "machine": environment(), "cells": []}
    if options.out.exists():
        table = json.loads(options.out.read_text(encoding="utf-8"))
        if table["settings"] != settings:
            raise SystemExit(f"{options.out} was measured with other settings: {table['settings']}, not {settings}.")
    done = {_key(cell): cell for cell in table["cells"]}
    groups = [group for found in _groups(options) if (group := _missing(found, done))]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        running = {}
        while groups or running:
            if time.monotonic() > end:
                groups.clear()
            while groups and len(running) < options.jobs:
                group = groups.pop(0)
                running[pool.submit(_measure_cell, group[0], options)] = group
            finished = wait(running, return_when=FIRST_COMPLETED).done if running else set()
            for future in finished:
                cell, *rest = running.pop(future)
                try:
                    found = future.result()
                except ValueError as error:  # activations that overflow, say
                    found = {"failed": str(error), "perplexity": None}
                table["cells"].append(cell | {"jobs": options.jobs} | found)
                write_json(options.out, table)
                print(json.dumps({k: v for k, v in table["cells"][-1].items() if k != "shares"}), flush=True)
                if rest and "shares" in found:  # ahead of what has not begun
                    groups.insert(0, [other | {"shares": found["shares"]} for other in rest])
    if time.monotonic() > end:
        print(f"the time is up; {options.out} has {len(table['cells'])} cells", file=sys.stderr)


def draw(table: dict[str, Any], image: Path, retrained: dict[str, Any] | None) -> None:
    """Perplexity over sparsity, a line for each method and allocation."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in table["cells"]:
        if cell["method"] == "dense":
            axes.axhline(cell["perplexity"], color="black", linewidth=1, label="dense")
        elif cell["perplexity"] is not None:
            point = (cell["sparsity"] * 100, cell["perplexity"])
            lines.setdefault((cell["method"], cell["allocation"]), []).append(point)
    colors: dict[str, str] = {}
    for (method, allocation), points in sorted(lines.items(), key=lambda line: _place(*line[0])):
        color = colors.setdefault(method, f"C{len(colors)}")
        style = {"uniform": "-", "owl": ":", "error": "--"}[allocation]
        axes.plot(
            *zip(*sorted(points), strict=True), style, color=color, marker="o", ms=4, label=f"{method}, {allocation}"
        )
    if retrained is not None:
        cases = retrained["cases"]
        dense = [case["perplexity"] for case in cases if case["name"].startswith("dense")]
        points = [(case["zeros"] * 100, case["perplexity"]) for case in cases if case["zeros"]]
        axes.plot(*zip(*points, strict=True), "k*", ms=9, label="retrained")
        axes.axhline(min(dense), color="black", linewidth=1, linestyle="--", label="dense, retrained")
    axes.set(xlabel="zeros, %", ylabel="perplexity (lower is better)", yscale="log")
    axes.set_title(f"{table['settings']['model']}: perplexity over sparsity")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(image, dpi=120)


def markdown(table: dict[str, Any]) -> str:
    """The table, a row for each method and allocation."""
    cells = {_key(cell): cell["perplexity"] for cell in table["cells"]}
    sparsities = sorted({cell["sparsity"] for cell in table["cells"] if cell["method"] != "dense"})
    rows = dict.fromkeys(key[::2] for key in cells if key[0] != "dense")
    lines = ["| | " + " | ".join(f"{s:.0%}" for s in sparsities) + " |", "|---" * (1 + len(sparsities)) + "|"]
    for method, allocation in sorted(rows, key=lambda row: _place(*row)):
        found = [cells.get((method, sparsity, allocation)) for sparsity in sparsities]
        words = ["-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}" for value in found]
        lines.append(f"| {method}, {allocation} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def _place(method: str, allocation: str) -> tuple[int, int]:
    """Of a line among the others."""
    methods, allocations = ["magnitude", "wanda", "sparsegpt", "alps"], ["uniform", "owl", "error"]
    return methods.index(method), allocations.index(allocation)


def _key(cell: Cell) -> tuple[str, float, str]:
    return cell["method"], cell["sparsity"], cell["allocation"]


def _groups(options: argparse.Namespace) -> Iterator[list[Cell]]:
    """What the table has. The cells of a group have a survey's result in common, which the first one finds."""
    yield [_DENSE]
    for allocation in options.allocations:
        for sparsity in options.sparsities:
            cells = {m: {"method": m, "sparsity": sparsity, "allocation": allocation} for m in options.methods}
            if allocation == "uniform":
                yield from ([cell] for cell in reversed(cells.values()))
            elif allocation == "owl":
                yield list(cells.values())
            else:
                together = [cells.pop(method) for method in ("sparsegpt", "alps") if method in cells]
                yield from chain([together] if together else [], ([cell] for cell in reversed(cells.values())))


def _missing(group: list[Cell], done: dict[tuple[str, float, str], Cell]) -> list[Cell]:
    """The cells of a group that are not done yet, with the sparsities that one of those done has found."""
    found = [{"shares": done[_key(cell)]["shares"]} for cell in group if "shares" in done.get(_key(cell), {})]
    return [cell | (found[0] if found else {}) for cell in group if _key(cell) not in done]


def _measure_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    disable_progress_bar()
    if options.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    if cell["method"] == "dense":
        return _perplexity(options.model, options)
    calibration = CalibrationConfig(options.calibration, options.samples, options.seqlen, options.seed)
    parent = Path(tempfile.mkdtemp()) if options.keep is None else options.keep
    folder = parent / f"{cell['method']}-{cell['sparsity']:g}-{cell['allocation']}"
    given = "shares" in cell
    allocation: str | Allocation = Given(cell["shares"]) if given else cell["allocation"]
    try:
        if not folder.exists():
            report = prune_folder(
                options.model,
                folder,
                cell["method"],
                cell["sparsity"],
                allocation=allocation,
                calibration=calibration,
                device=options.device,
                dtype=None if options.dtype is None else getattr(torch, options.dtype),
            )
            cost = {
                "prune_seconds": report.seconds,
                "block_seconds": sum(report.stage_seconds) / len(report.stage_seconds),
                "survey_was_given": given,
                "peak_bytes": report.peak_bytes,
            }
        else:  # kept from a run that was stopped before it was measured
            cost = {"prune_seconds": None}
        record = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
        shares = {name: layer["sparsity"] for name, layer in record["layers"].items()}
        found = {"zeros": record["zeros"] / record["weights"], **cost, "warnings": len(record["warnings"])}
        if cell["allocation"] != "uniform":
            found["shares"] = shares
        return found | _perplexity(folder, options)
    finally:
        if options.keep is None:
            shutil.rmtree(parent)


def _perplexity(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    dtype = options.dtype or ("float32" if options.device == "cpu" else None)
    model, tokenizer = load_folder(folder, options.device, dtype and getattr(torch, dtype))
    result = perplexity(
        model, load_text(options.text), tokenizer, window=options.window, max_windows=options.max_windows
    )
    return {"perplexity": result.perplexity, "windows": result.windows, "evaluate_seconds": result.seconds}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all cells have in common."""
    return {
        "model": options.model.name,
        "calibration": f"{Path(options.calibration).name}, {options.samples} x {options.seqlen}, seed {options.seed}",
        "text": options.text.name,
        "window": options.window,
        "max_windows": options.max_windows,
        "device": options.device,
        "dtype": options.dtype or "auto",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration", help="text that the methods look at")
    parser.add_argument("--text", type=Path, help="text that perplexity is measured on")
    parser.add_argument("--out", type=Path, default=Path("pruning-table.json"))
    parser.add_argument("--methods", type=_words, default=["magnitude", "wanda", "sparsegpt", "alps"])
    parser.add_argument(
        "--sparsities", type=lambda text: [float(word) for word in _words(text)], default="0.5,0.6,0.7,0.8"
    )
    parser.add_argument("--allocations", type=_words, default=["uniform", "owl", "error"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="to walk and to evaluate in")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after so long")
    parser.add_argument("--keep", type=Path, help="folder for the pruned models")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw the plot of a table")
    parser.add_argument("--print", type=Path, metavar="JSON", help="only print a table as Markdown")
    parser.add_argument("--retrained", type=Path, metavar="JSON", help="of retrain_table.py, to draw too")
    parser.add_argument("--image", type=Path, default=Path("pruning.png"))
    options = parser.parse_args()
    if not options.draw and not options.print and not (options.model and options.calibration and options.text):
        parser.error("MODEL, --calibration and --text are needed to measure; --draw JSON or --print JSON to show")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    return options


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


if __name__ == "__main__":
    main()
