"""Checkpoints of a training run: safetensors and JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from flash_llm.errors import CheckpointError
from flash_llm.files import write_json
from flash_llm.prune.files import write_tensors
from flash_llm.prune.retrain.processes import ALONE, Processes, own, part_like

_NAME = "state"


def save_state(
    folder: Path, tensors: Mapping[str, Tensor], numbers: dict[str, Any], processes: Processes = ALONE
) -> None:
    """Keep the state of a run in a folder, in place of the one before. Each process writes its own parts.

    Args:
        folder: of the job.
        tensors: on any device.
        numbers: JSON data; ``numbers["step"]`` tells states apart.
        processes: of the run.
    """
    target = folder / f"{_NAME}-{numbers['step']:08d}"
    temporary = folder / f".{target.name}.tmp"
    if processes.any(target.exists()):
        return
    if processes.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    processes.wait()
    copies = {name: own(tensor.detach()).to("cpu").contiguous() for name, tensor in tensors.items()}
    write_tensors(temporary / _file(processes.rank), copies)
    processes.wait()
    if processes.first:
        write_json(temporary / "numbers.json", numbers)
        os.replace(temporary, target)
        for older in folder.glob(f"{_NAME}-*"):
            if older != target:
                shutil.rmtree(older)
    processes.wait()


def _file(rank: int) -> str:
    return "tensors.safetensors" if rank == 0 else f"tensors-{rank}.safetensors"


def load_state(folder: Path, rank: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state in a folder, of the process ``rank``; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    found = sorted(folder.glob(f"{_NAME}-*"))
    if not found:
        return None
    try:
        numbers = json.loads((found[-1] / "numbers.json").read_text(encoding="utf-8"))
        return load_file(found[-1] / _file(rank)), numbers
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{found[-1]} of an interrupted run is damaged ({error}); start again with resume=False."
        ) from error


def optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors by flat names."""
    return {
        f"optimizer.{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up :func:`optimizer_state`, or this process's parts of it."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            weight = weights[int(index)]
            # Moments are shared out as their weight is; the number of steps is a scalar.
            part = part_like(tensor.to(own(weight).device), weight) if tensor.dim() else tensor
            state.setdefault(int(index), {})[name] = part
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
