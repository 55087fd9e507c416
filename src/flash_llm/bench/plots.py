"""Plots of what ``flash-llm bench kernels`` measured, from a report alone: bars for a few N, and lines over many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flash_llm.plotting import png, require_plot

Report = dict[str, Any]
Row = dict[str, Any]

PEER_TITLES = {"csr": "CSR (cuSPARSE)", "two_of_four_csr": "2:4 and CSR"}
_PEER_MARKERS = {"csr": "x", "two_of_four_csr": "+"}
_MOST_PANELS = 8
_FEWEST_POINTS = 3


def zeros(sparsity: float) -> str:
    """A share of zeros as a percentage."""
    return f"{round(100 * sparsity, 4):g}%"


def suited(report: Report) -> dict[str, Callable[[Report], bytes]]:
    """The plots that show a report well, by the names of their files: :func:`speedups` of few N, :func:`over_n`."""
    ns = {row["n"] for row in report["results"]}
    made: dict[str, Callable[[Report], bytes]] = {}
    if 1 <= len(ns) <= _MOST_PANELS:
        made["kernels.png"] = speedups
    if len(ns) >= _FEWEST_POINTS:
        made["kernels-n.png"] = over_n
    return made


def speedups(report: Report) -> bytes:
    """A PNG: speed-up over dense, a panel for every n, a group of bars for every shape, a bar for every sparsity.

    Peers' speed-ups are marks on the bars.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the report has no results.
    """
    results, shapes = _results(report)
    from matplotlib.figure import Figure

    ns = sorted({row["n"] for row in results})
    figure = Figure(figsize=(max(6.0, 1.2 * len(shapes)), 2.6 * len(ns) + 1), layout="constrained")
    panels = figure.subplots(len(ns), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    sparsities = sorted({row["sparsity"] for row in results})
    for panel, n in zip(panels, ns, strict=True):
        _draw_bars(panel, [row for row in results if row["n"] == n], shapes, sparsities)
        panel.set_title(f"N = {n}", loc="left")
        panel.set_ylabel("speed-up over dense")
    panels[-1].set_xticks(range(len(shapes)), [f"{rows}\n× {columns}" for rows, columns in shapes])
    panels[-1].set_xlabel("weight: rows × columns")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(_title(report), x=0.01, ha="left")
    return png(figure)


def _draw_bars(panel: Any, results: list[Row], shapes: list[tuple[int, int]], sparsities: list[float]) -> None:
    """One panel's bars and marks."""
    width = 0.8 / len(sparsities)
    for i, sparsity in enumerate(sparsities):
        rows = [row for row in results if row["sparsity"] == sparsity]
        at = [shapes.index((row["rows"], row["columns"])) + (i - (len(sparsities) - 1) / 2) * width for row in rows]
        color = _color(i, len(sparsities))
        panel.bar(at, [row["speedup"] for row in rows], width, color=color, label=f"{zeros(sparsity)} zeros")
        for peer, marker in _PEER_MARKERS.items():
            points = [(x, row["peers"][peer]["speedup"]) for x, row in zip(at, rows, strict=True) if _ran(row, peer)]
            if points:
                label = PEER_TITLES[peer] if i == 0 else None
                panel.scatter(*zip(*points, strict=True), s=14, marker=marker, color="black", lw=0.8, label=label)
    panel.axhline(1, color="black", lw=0.8, ls="--")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.set_xlim(-0.6, len(shapes) - 0.4)


def _ran(row: Row, peer: str) -> bool:
    return "speedup" in row.get("peers", {}).get(peer, {})


def over_n(report: Report) -> bytes:
    """A PNG: above, microseconds over N on logarithmic axes, dense and for every sparsity; below, dense over sparse.

    A column of panels for every shape.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the report has no results.
    """
    results, shapes = _results(report)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.2 * len(shapes)), 7), layout="constrained")
    panels = figure.subplots(2, len(shapes), sharex=True, sharey="row", squeeze=False)
    sparsities = sorted({row["sparsity"] for row in results})
    for (times, ratios), shape in zip(panels.T, shapes, strict=True):
        _draw_lines(times, ratios, [row for row in results if (row["rows"], row["columns"]) == shape], sparsities)
        times.set_title(f"{shape[0]} × {shape[1]}", loc="left")
        ratios.set_xlabel("N: rows of x")
    panels[1, 0].set_ylim(bottom=0)  # of all, now that all is drawn
    panels[0, 0].set_ylabel("microseconds")
    panels[1, 0].set_ylabel("dense time over sparse")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(_title(report), x=0.01, ha="left")
    return png(figure)


def _draw_lines(times: Any, ratios: Any, results: list[Row], sparsities: list[float]) -> None:
    """One shape's two panels."""
    dense = sorted({row["n"]: row["dense_us"] for row in results}.items())
    times.plot(*zip(*dense, strict=True), color="black", ls="--", lw=1.2, label="dense")
    ratios.axhline(1, color="black", ls="--", lw=1.2)
    for i, sparsity in enumerate(sparsities):
        rows = sorted((row for row in results if row["sparsity"] == sparsity), key=lambda row: row["n"])
        style = {"color": _color(i, len(sparsities)), "marker": ".", "lw": 1.2, "label": f"{zeros(sparsity)} zeros"}
        times.plot([row["n"] for row in rows], [row["us"] for row in rows], **style)
        ratios.plot([row["n"] for row in rows], [row["speedup"] for row in rows], **style)
    times.set_yscale("log")
    for panel in (times, ratios):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)


def _results(report: Report) -> tuple[list[Row], list[tuple[int, int]]]:
    """What is to be plotted, and its shapes in the order in which they were measured."""
    require_plot()
    results = report["results"]
    if not results:
        raise ValueError("the report has no results to plot")
    return results, list(dict.fromkeys((row["rows"], row["columns"]) for row in results))


def _color(i: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 - 0.8 * i / max(1, count - 1))


def _title(report: Report) -> str:
    where = report["environment"]
    kernel = where.get("kernel") or "auto"
    return str(where.get("gpu") or "") + ("" if kernel == "auto" else f", {kernel} kernel")
