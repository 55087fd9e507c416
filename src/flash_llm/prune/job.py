"""The working folder of a pruning job: what is finished, for which arguments, and what the next block needs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flash_llm.errors import CheckpointError
from flash_llm.files import write_json
from flash_llm.prune.files import write_tensors

# Seconds of writing that are not worth saving.
_QUICK = 0.25
_DONE = "done.json"


class Stages:
    """The stages of a job on disk: which are finished, what was recorded of them, and what the next one needs.

    ``done.json`` has a record of each finished stage and is written after all else of them; ``hidden-N.safetensors``
    are the hidden states that enter stage N.

    Args:
        folder: theirs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: list[Any] = []  # records of stages that are finished, but not yet on disk
        self._due = 0.0

    def records(self) -> list[Any]:
        """What was recorded of the finished stages, in order."""
        path = self.folder / _DONE
        records: list[Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return records

    def finish(self, stage: int, record: Any, hidden: Tensor | None) -> None:
        """Mark a stage as finished, and keep the hidden states that enter the next.

        They may be gigabytes, and stages may be quick. So that writing takes no more than a tenth of the time, some
        stages are marked together with a later one, and are done again by a run that takes this one up.

        Args:
            stage: its number.
            record: JSON data.
            hidden: inputs of the next stage; None: there is none, or it needs none.
        """
        self._pending.append(record)
        if hidden is not None:
            start = time.monotonic()
            if start < self._due:
                return
            write_tensors(self._hidden(stage + 1), {"hidden": hidden})
            cost = time.monotonic() - start
            self._due = start + cost + 10 * max(0.0, cost - _QUICK)
        write_json(self.folder / _DONE, self.records() + self._pending)
        self._pending.clear()
        for path in self.folder.glob("hidden-*.safetensors"):
            if path != self._hidden(stage + 1):
                path.unlink()

    def hidden(self, stage: int) -> Tensor:
        """The hidden states that enter a stage.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            with safe_open(self._hidden(stage), framework="pt") as file:
                stored = file.get_slice("hidden")
                # One by one, into memory of our own: what is read may be a view of the file.
                first = stored[0:1]
                hidden = torch.empty(stored.get_shape(), dtype=first.dtype)
                for index in range(len(hidden)):
                    hidden[index].copy_(stored[index])
                return hidden
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self._hidden(stage)} of an interrupted run is damaged ({error}); start again with resume=False."
            ) from error

    def _hidden(self, stage: int) -> Path:
        return self.folder / f"hidden-{stage:05d}.safetensors"


class Job(Stages):
    """A pruning job on disk, beside the folder that it makes.

    ``model/`` becomes the output. Its own stages are those of the pruning; ``survey`` are those of the pass before it.

    Args:
        out: the output folder.
        arguments: what the result depends on, as JSON data.
    """

    def __init__(self, out: Path, arguments: dict[str, Any]) -> None:
        self.out = out
        super().__init__(out.parent / f".{out.name}.partial")
        self.survey = Stages(self.folder / "survey")
        self.model = self.folder / "model"
        # As it will be read again, so that both compare equal.
        self._arguments = json.loads(json.dumps(arguments))

    @contextmanager
    def started(self, resume: bool) -> Iterator[None]:
        """Make or take up the working folder, and hold it against other processes.

        A job that fails before it has finished anything leaves no folder behind.

        Raises:
            FileExistsError: another process works in it, or it belongs to a job with other arguments.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FileExistsError(
                    f"Another process is making {self.out} (in {self.folder}); wait for it."
                ) from error
            # Without model/ there is only what a delivered job left behind.
            if not (resume and self.model.is_dir()):
                self._clear()
            self._check_arguments()
            self.model.mkdir(exist_ok=True)
            for stages in (self, self.survey):
                stages.folder.mkdir(exist_ok=True)
            try:
                yield
            except BaseException:
                if self.folder.is_dir() and not self._is_begun():
                    shutil.rmtree(self.folder)
                raise

    def deliver(self) -> None:
        """Give the finished folder its name and remove the rest."""
        os.replace(self.model, self.out)
        shutil.rmtree(self.folder)

    def _check_arguments(self) -> None:
        path = self.folder / "arguments.json"
        if not path.is_file() or not self._is_begun():
            self._clear()
            write_json(path, self._arguments)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in before.keys() | self._arguments.keys() if before.get(key) != self._arguments.get(key)]
        if changed:
            differences = "; ".join(
                f"{key}: {before.get(key)} then, {self._arguments.get(key)} now" for key in sorted(changed)
            )
            raise FileExistsError(
                f"{self.folder} holds an unfinished job with other arguments ({differences}). "
                "Finish it with those, or discard it with resume=False."
            )

    def _is_begun(self) -> bool:
        """Whether there is more than a job has before it finishes its first part."""
        own = {"lock", "arguments.json", self.model.name, self.survey.folder.name}
        if any(path.name not in own for path in self.folder.iterdir()):
            return True
        return self.survey.folder.is_dir() and any(self.survey.folder.iterdir())

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
