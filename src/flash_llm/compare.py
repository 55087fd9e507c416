"""Several model folders side by side: quality, bytes, zeros. As JSON, a table and a plot.

A comparison is a dictionary: ``settings``, the same for all, and ``rows``, one for each folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flash_llm.checkpoint import read_folder
from flash_llm.evaluate import load_text, perplexity
from flash_llm.files import write_json, write_whole
from flash_llm.plotting import png, require_plot
from flash_llm.tasks import run_tasks
from flash_llm.tokenizer import load_tokenizer

Comparison = dict[str, Any]
Row = dict[str, Any]

FILES = ("comparison.json", "comparison.md", "comparison.png")


def compare_folders(
    folders: Sequence[str | Path],
    text: str | Path,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    load: Callable[[Path], tuple[Any, Any]] | None = None,
) -> Comparison:
    """Measure each of some model folders in the same way.

    Args:
        folders: compressed or dense.
        text: file to measure perplexity on; the windows don't overlap, as in the papers.
        window, max_windows: as for :func:`flash_llm.evaluate.perplexity`.
        tasks, limit: as for :func:`flash_llm.tasks.run_tasks`.
        device: where the models run.
        dtype: in which; None: each in its own.
        load: makes a model and a tokenizer of a folder. Default: as transformers does.

    Returns:
        The comparison; a row has "name" (as short as tells the folders apart), "folder", "perplexity", "windows",
        "tokens", "nbytes" and "dense_nbytes" (of all tensors as they lie in the folder, and if none were packed),
        "sparsity" (share of zeros in the linear layers), "compressed", "dtype" and "tasks".

    Raises:
        ValueError: no folder, one named twice, or what perplexity and tasks refuse.
        FileNotFoundError, CheckpointError, FormatError: a folder is missing or damaged.
        ImportError: tasks are wanted and lm-eval is not installed.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("There is nothing to compare: name at least one model folder.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"A folder is named twice: {', '.join(map(str, paths))}.")
    words = load_text(text)
    # Of all folders, before hours are spent on the first.
    rows = [_described(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    for path, row in zip(paths, rows, strict=True):
        model, tokenizer = load(path) if load is not None else load_folder(path, device, dtype)
        result = perplexity(model, words, tokenizer, window=window, max_windows=max_windows)
        row |= {"perplexity": result.perplexity, "windows": result.windows, "tokens": result.tokens}
        row |= {"dtype": str(model.dtype).removeprefix("torch."), "seconds": result.seconds}
        row["tasks"] = run_tasks(model, tokenizer, tasks, limit=limit) if tasks else {}
        del model
    settings = {"text": str(text), "window": window, "max_windows": max_windows, "tasks": list(tasks), "limit": limit}
    return {"settings": settings | {"device": device, "torch": torch.__version__}, "rows": rows}


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, with a line on how it was measured."""
    settings, rows = comparison["settings"], comparison["rows"]
    metrics = _metrics(rows)
    head = ["model", "zeros", "MB", "of dense", "perplexity", "windows", *(f"{task} {name}" for task, name in metrics)]
    lines = [
        [
            row["name"],
            "-" if row["sparsity"] is None else f"{row['sparsity']:.1%}",
            f"{row['nbytes'] / 1e6:.1f}",
            f"{row['nbytes'] / row['dense_nbytes']:.1%}",
            f"{row['perplexity']:.3f}",
            str(row["windows"]),
            *(_cell(row["tasks"].get(task, {}), name) for task, name in metrics),
        ]
        for row in rows
    ]
    dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
    how = f"Perplexity on {settings['text']}, windows of {settings['window']} tokens that don't overlap; {dtypes} on "
    how += f"{settings['device']}, torch {settings['torch']}."
    if settings["limit"] is not None:
        how += f" Of each task the first {settings['limit']} documents alone."
    table = [head, ["---"] * len(head), *lines]
    return "\n".join([how, "", *("| " + " | ".join(cells) + " |" for cells in table), ""])


def plot(comparison: Comparison) -> bytes:
    """A PNG: perplexity over bytes, a point for each folder.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_plot()
    from matplotlib.figure import Figure

    rows = comparison["rows"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for row in rows:
        panel.scatter(row["nbytes"] / 1e6, row["perplexity"], marker="s" if row["compressed"] else "o")
        zeros = "" if row["sparsity"] is None else f", {row['sparsity']:.0%} zeros"
        place = (row["nbytes"] / 1e6, row["perplexity"])
        panel.annotate(row["name"] + zeros, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    values = [row["perplexity"] for row in rows]
    if max(values) > 5 * min(values):
        panel.set_yscale("log")
    panel.margins(x=0.2)
    panel.set_xlabel("MB of all tensors (square: compressed)")
    panel.set_ylabel("perplexity")
    panel.grid(alpha=0.3, which="both")
    return png(figure)


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.json``, ``.md`` and ``.png`` into a folder, each of them whole."""
    picture = plot(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILES[0], comparison)
    write_whole(folder / FILES[1], markdown(comparison).encode())
    write_whole(folder / FILES[2], picture)


def _names(paths: list[Path]) -> list[str]:
    """The folders' names, and their parents' too where two have the same."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    whole = [str(path.resolve()) for path in paths]
    root = os.path.commonpath(whole)
    return [os.path.relpath(path, root) for path in whole]


def _described(path: Path, name: str) -> Row:
    info = read_folder(path, count_zeros=True)
    counted = [(layer.nnz, layer.shape[0] * layer.shape[1]) for layer in info.layers if layer.nnz is not None]
    total = sum(size for _, size in counted)
    sparsity = 1 - sum(nnz for nnz, _ in counted) / total if total else None
    sizes = {"nbytes": info.nbytes, "dense_nbytes": info.dense_nbytes}
    return {"name": name, "folder": str(path), "compressed": info.compressed, "sparsity": sparsity, **sizes}


def load_folder(path: Path, device: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """A model ready to run, in ``dtype`` or, without one, its own; and its tokenizer."""
    tokenizer = load_tokenizer(path)
    place = {} if device == "cpu" else {"device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True, **place)
    return model.eval(), tokenizer


def _metrics(rows: list[Row]) -> list[tuple[str, str]]:
    """Tasks and metrics, without the standard errors, which stand beside them."""
    seen: dict[tuple[str, str], None] = {}
    for row in rows:
        for task, metrics in row["tasks"].items():
            seen |= {(task, name): None for name in metrics if not name.endswith("_stderr")}
    return list(seen)


def _cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
