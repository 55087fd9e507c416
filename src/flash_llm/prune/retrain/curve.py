"""The loss curve of a run, as a plot."""

from __future__ import annotations

from typing import Any

from flash_llm.plotting import png, require_plot


def plot(curve: dict[str, Any]) -> bytes:
    """Draw a loss curve.

    Args:
        curve: ``"train"`` and ``"validation"``: lists of ``{"step", "loss", ...}``, the losses in nats a token, and
            the share of zeros as ``"sparsity"`` in the former; ``"title"``.

    Returns:
        A PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_plot()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    train, validation = curve["train"], curve["validation"]
    panel.plot([row["step"] for row in train], [row["loss"] for row in train], lw=0.8, label="training loss")
    steps = [row["step"] for row in validation]
    panel.plot(steps, [row["loss"] for row in validation], "o-", label="validation, cross-entropy")
    panel.set_xlabel("step")
    panel.set_ylabel("nats a token")
    panel.grid(alpha=0.3)
    if len({row["sparsity"] for row in train}) > 1:
        zeros = panel.twinx()
        sparsities = [100 * row["sparsity"] for row in train]
        zeros.plot([row["step"] for row in train], sparsities, color="gray", ls="--", lw=0.8)
        zeros.set_ylabel("zeros in pruned layers, % (dashed)")
    panel.legend(frameon=False)
    panel.set_title(curve["title"], loc="left", fontsize=9)
    return png(figure)
