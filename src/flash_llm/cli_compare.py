"""``flash-llm compare DIR DIR ...``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

Tasks = Annotated[str, typer.Option(help='Tasks of lm-eval to score too, as "piqa,arc_easy".')]
Limit = Annotated[int | None, typer.Option(help="Take only the first documents of each task: to try it out.")]


def compare(
    models: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Model folders, compressed or dense.")],
    text: Annotated[
        Path, typer.Option(help="Text file: .txt or .jsonl, also .gz. WikiText's rows are joined as in the papers.")
    ],
    window: Annotated[int, typer.Option(help="Tokens in a window; windows don't overlap.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Take only the first windows of the text.")] = None,
    tasks: Tasks = "",
    limit: Limit = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json, .md and .png: the table, and quality over bytes.")
    ] = None,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.')] = "auto",
    dtype: Annotated[str, typer.Option(help='What to compute in: "auto", "float32", "float16" or "bfloat16".')] = (
        "auto"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure several models in the same way: perplexity, bytes, zeros, tasks.

    \b
    Examples:
      flash-llm compare MODEL PRUNED SMALL --text wikitext2-test.txt
      flash-llm compare MODEL A B C --text wikitext2-test.txt --report REPORT
      flash-llm compare MODEL SMALL --text wikitext2-test.txt --tasks piqa,arc_easy --report REPORT
    """
    from flash_llm.cli import Dtype, load_model, usable_device

    if dtype not in list(Dtype.__members__):
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(Dtype.__members__)}")
    from flash_llm.compare import FILES, compare_folders, markdown, require_plot, write_report

    device = usable_device(device)
    if report is not None:
        require_plot()
        if found := [name for name in FILES if (report / name).exists()]:
            raise FileExistsError(f"{report} already holds {', '.join(found)}: name another folder, or remove them")
    found_rows = compare_folders(
        models,
        text,
        window=window,
        max_windows=max_windows,
        tasks=task_names(tasks),
        limit=limit,
        device=device,
        load=lambda path: load_model(path, device, Dtype(dtype)),
    )
    if report is not None:
        write_report(found_rows, report)
    print(json.dumps(_plain(found_rows), indent=2, allow_nan=False) if json_ else markdown(found_rows), end="")
    if json_:
        print()


def task_names(words: str) -> list[str]:
    """The names in "one,two"."""
    return [name for name in (part.strip() for part in words.split(",")) if name]


def _plain(value: Any) -> Any:
    """The value without what JSON doesn't know: infinity and NaN."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
