"""``flash-llm compare DIR DIR ...``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from flash_llm.cli_options import Device, Dtype, Json, Limit, MaxWindows, RunDtype, Tasks, Text, Window, task_names


def compare(
    models: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Model folders, compressed or dense.")],
    text: Text,
    window: Window = 2048,
    max_windows: MaxWindows = None,
    tasks: Tasks = "",
    limit: Limit = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json, .md and .png: the table, and quality over bytes.")
    ] = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
    json_: Json = False,
) -> None:
    """Measure several models in the same way: perplexity, bytes, zeros, tasks.

    \b
    Examples:
      flash-llm compare MODEL PRUNED SMALL --text wikitext2-test.txt
      flash-llm compare MODEL A B C --text wikitext2-test.txt --report REPORT
      flash-llm compare MODEL SMALL --text wikitext2-test.txt --tasks piqa,arc_easy --report REPORT
    """
    from flash_llm.cli import load_model, usable_device
    from flash_llm.compare import FILES, compare_folders, markdown, write_report
    from flash_llm.files import check_free
    from flash_llm.plotting import require_plot

    device = usable_device(device)
    if report is not None:
        require_plot()
        check_free(report, FILES)
    found_rows = compare_folders(
        models,
        text,
        window=window,
        max_windows=max_windows,
        tasks=task_names(tasks),
        limit=limit,
        device=device,
        load=lambda path: load_model(path, device, dtype),
    )
    if report is not None:
        write_report(found_rows, report)
    print(json.dumps(_plain(found_rows), indent=2, allow_nan=False) if json_ else markdown(found_rows), end="")
    if json_:
        print()


def _plain(value: Any) -> Any:
    """The value without what JSON doesn't know: infinity and NaN."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
