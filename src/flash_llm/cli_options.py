"""What several verbs of the command line take."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Floating-point types that a model can be run in."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Values(str, Enum):
    """How a packed weight's nonzeros are stored."""

    bits16 = "16-bit"
    fp8 = "fp8"
    int8 = "int8"


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to make; it must not exist, or be empty.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.')]
RunDtype = Annotated[
    Dtype, typer.Option(help='What to compute in; "auto": float32 on a CPU, the model\'s own on a GPU.')
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Leave layers dense whose name this regular expression is found in; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Text = Annotated[
    Path, typer.Option(help="Text file: .txt or .jsonl, also .gz. WikiText's rows are joined as in the papers.")
]
Window = Annotated[int, typer.Option(help="Tokens in a window; windows don't overlap.")]
MaxWindows = Annotated[int | None, typer.Option(help="Take only the first windows of the text.")]
Tasks = Annotated[str, typer.Option(help='Tasks of lm-eval to score too, as "piqa,arc_easy".')]
Limit = Annotated[int | None, typer.Option(help="Take only the first documents of each task: to try it out.")]


def task_names(words: str) -> list[str]:
    """The names in "one,two"."""
    return [name for name in (part.strip() for part in words.split(",")) if name]
