"""Perplexity after pruning, by method, sparsity and allocation: a table as JSON, and a plot of it.

    python examples/pruning_table.py MODEL --calibration text.txt.gz --text wikitext2-test.txt.gz --out table.json
    python examples/pruning_table.py --plot table.json --image perplexity.svg

A cell that the JSON has already is not measured again, so that a run may be stopped at any time, or given a limit, and
called again. ``--keep DIR`` keeps the pruned folders; without it each is deleted once it is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_llm.environment import environment
from flash_llm.evaluate import load_text, perplexity
from flash_llm.files import write_json
from flash_llm.prune import CalibrationConfig, prune_folder


def main() -> None:
    options = _options()
    if options.plot:
        plot(json.loads(options.plot.read_text(encoding="utf-8")), options.image)
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
    for cell in _cells(options):
        if any(cell.items() <= done.items() for done in table["cells"]):
            continue
        if time.monotonic() > end:
            print(f"the time is up; {options.out} has {len(table['cells'])} cells", file=sys.stderr)
            return
        table["cells"].append(cell | _measure_cell(cell, options))
        write_json(options.out, table)
        print(json.dumps(table["cells"][-1]), flush=True)


def plot(table: dict[str, Any], image: Path) -> None:
    """Perplexity over sparsity, a line for each method and allocation."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in table["cells"]:
        if cell["method"] == "dense":
            axes.axhline(cell["perplexity"], color="black", linewidth=1, label="dense")
        else:
            point = (cell["sparsity"] * 100, cell["perplexity"])
            lines.setdefault((cell["method"], cell["allocation"]), []).append(point)
    colors: dict[str, str] = {}
    for (method, allocation), points in sorted(lines.items()):
        color = colors.setdefault(method, f"C{len(colors)}")
        style = {"uniform": "-", "owl": ":", "error": "--"}[allocation]
        axes.plot(*zip(*sorted(points), strict=True), style, color=color, marker="o", label=f"{method}, {allocation}")
    axes.set(xlabel="zeros, %", ylabel="perplexity (lower is better)", yscale="log")
    axes.set_title(f"{table['settings']['model']}: perplexity over sparsity")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(image)


def _cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the table has, quick ones first."""
    yield {"method": "dense", "sparsity": 0.0, "allocation": "uniform"}
    for allocation in options.allocations:
        for method in options.methods:
            for sparsity in options.sparsities:
                yield {"method": method, "sparsity": sparsity, "allocation": allocation}


def _measure_cell(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    if cell["method"] == "dense":
        return _perplexity(options.model, options)
    calibration = CalibrationConfig(options.calibration, options.samples, options.seqlen, options.seed)
    parent = Path(tempfile.mkdtemp(dir=options.keep)) if options.keep is None else options.keep
    folder = parent / f"{cell['method']}-{cell['sparsity']:g}-{cell['allocation']}"
    try:
        start = time.perf_counter()
        if not folder.exists():
            report = prune_folder(
                options.model,
                folder,
                cell["method"],
                cell["sparsity"],
                allocation=cell["allocation"],
                calibration=calibration,
                device=options.device,
            )
            zeros, seconds = report.zeros / report.weights, time.perf_counter() - start
        else:  # kept from a run that was stopped before it was measured
            record = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
            zeros, seconds = record["zeros"] / record["weights"], None
        return {"zeros": zeros, "prune_seconds": seconds} | _perplexity(folder, options)
    finally:
        if options.keep is None:
            shutil.rmtree(parent)


def _perplexity(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.float32 if options.device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after so long")
    parser.add_argument("--keep", type=Path, help="folder for the pruned models")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of a table")
    parser.add_argument("--image", type=Path, default=Path("pruning.svg"))
    options = parser.parse_args()
    if not options.plot and not (options.model and options.calibration and options.text):
        parser.error("MODEL, --calibration and --text are needed to measure; --plot JSON to draw")
    return options


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


if __name__ == "__main__":
    main()
