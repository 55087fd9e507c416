"""Tasks of EleutherAI's lm-evaluation-harness (lm-eval), through its own Python interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_DETAILS = ("alias", "name", "sample_len")


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Score a model on tasks.

    Args:
        model: a causal language model of transformers, compressed or dense, on its device.
        tokenizer: its tokenizer.
        names: tasks as lm-eval calls them: "lambada_openai", "piqa", ...
        fewshot: examples in a prompt. Default: the task's own.
        limit: take only the first documents of a task: for trying out, not for reporting.
        batch_size: documents at a time.

    Returns:
        For each task its metrics, such as ``{"acc": 0.31, "acc_stderr": 0.006}``.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no task of such a name, or a number that is no count.
    """
    for label, value, least in (("limit", limit, 1), ("fewshot", fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{label}={value} must be at least {least}.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"Tasks need lm-eval ({error}): pip install 'flash-llm[eval]'.") from error
    manager = TaskManager()
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(f"lm-eval knows no task {name!r}; `lm-eval ls tasks` lists those that it knows.")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(names), num_fewshot=fewshot, limit=limit, task_manager=manager
    )
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Numbers by the metrics' names, without the name of the filter that lm-eval appends."""
    return {
        key.partition(",")[0]: float(value)
        for key, value in values.items()
        if key not in _DETAILS and isinstance(value, (int, float))
    }
