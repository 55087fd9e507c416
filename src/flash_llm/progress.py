"""The progress bar of everything that takes long: on standard error, and only where somebody watches."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(show: bool = True, *, transient: bool = False) -> Progress:
    """A bar with a count, the time gone and the time left.

    Args:
        show: whether there is to be one, if standard error is a terminal.
        transient: it vanishes at its end.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=transient)
