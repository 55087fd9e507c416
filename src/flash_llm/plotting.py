"""What all plots share: whether they can be made, and a figure as a file's content."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_plot() -> bool:
    """Is matplotlib there?"""
    return importlib.util.find_spec("matplotlib") is not None


def require_plot() -> None:
    """Raises ImportError where plots can't be made."""
    if not can_plot():
        raise ImportError("a plot needs matplotlib, which isn't installed: pip install 'flash-llm[bench]'")


def png(figure: Figure) -> bytes:
    """The content of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
