"""Retraining in two processes, which torch's FSDP shares the model out to: the same as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_llm.prune import prune_folder
from flash_llm.prune.retrain import RetrainConfig, retrain
from flash_llm.prune.retrain.processes import Processes
from flash_llm.prune.retrain.select import lowest_of_all

from .conftest import tensors

# One process of several. It may be cut off before a step, as if it had been asked to stop at that point.
RUN = """
import json, sys
from flash_llm.prune.retrain import RetrainConfig, retrain
from flash_llm.prune.retrain.processes import is_first
from flash_llm.prune.retrain.trainer import Trainer

task = json.loads(sys.argv[1])
advance = Trainer.advance
def cut(self):
    if self.step == task["cut"]:
        raise KeyboardInterrupt
    advance(self)
Trainer.advance = cut
try:
    config = RetrainConfig(**task["config"])
    report = retrain(task["model"], task["out"], config, teacher=task["teacher"], device=task["device"], progress=False)
except KeyboardInterrupt:
    raise SystemExit(0)
if is_first():
    print(json.dumps({"zeros": report.zeros, "resumed": report.resumed_step, "loss": report.loss_after}))
"""

SETTINGS: dict[str, Any] = {"steps": 12, "batch": 4, "micro_batch": 1, "seqlen": 32, "validation": 2, "lr": 1e-3}


def in_two(
    model: Path, out: Path, config: dict[str, Any], teacher: Path | None = None, cut: int = -1, device: str = "cpu"
) -> dict[str, Any]:
    """What the first of two processes says; {} if they were cut off."""
    task = {"model": str(model), "out": str(out), "config": config, "cut": cut, "device": device}
    task["teacher"] = None if teacher is None else str(teacher)
    script = out.parent / "run.py"
    script.write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [*command, json.dumps(task)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-9000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


@pytest.fixture
def dense(make_model: Callable[..., Path]) -> Path:
    return make_model("llama")


@pytest.fixture
def pruned(dense: Path, tmp_path: Path) -> Path:
    prune_folder(dense, tmp_path / "pruned", "magnitude", 0.5, progress=False)
    return tmp_path / "pruned"


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"batch": 6, "micro_batch": 2},  # three windows for each, in parts of two and one
        {"sparsity": 0.8, "score": "taylor", "scope": "global", "rounds": 3},
        {"sparsity": 0.8, "schedule": "admm", "score": "taylor", "interval": 2},
    ],
    ids=["hold", "uneven", "taylor", "admm"],
)
def test_two_processes_train_what_one_trains(how: dict[str, Any], dense: Path, pruned: Path, text: Path) -> None:
    config = {"text": str(text)} | SETTINGS | how
    one, two = pruned.parent / "one", pruned.parent / "two"
    alone = retrain(pruned, one, RetrainConfig(**config), teacher=dense, device="cpu", progress=False)
    both = in_two(pruned, two, config, dense)
    assert both["zeros"] == alone.zeros
    assert both["loss"] == pytest.approx(alone.loss_after, rel=1e-4)
    before, first, second = tensors(pruned), tensors(one), tensors(two)
    assert list(first) == list(second)
    # Sums are added up in another order, so that two scores that are nearly equal may change places.
    apart = sum(int(((first[name] == 0) != (second[name] == 0)).sum()) for name in first)
    assert apart <= 2 if "sparsity" in how else apart == 0
    for name in first:
        same = (first[name] == 0) == (second[name] == 0)
        torch.testing.assert_close(first[name][same], second[name][same], rtol=2e-2, atol=2e-4)
        assert not torch.equal(first[name], before[name])


def test_two_processes_go_on_from_their_checkpoint(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """With a tied head, and dropout, which every process draws for itself."""
    dense, pruned = make_model("opt"), tmp_path / "pruned"
    prune_folder(dense, pruned, "magnitude", 0.5, progress=False)
    how = {"sparsity": 0.8, "score": "taylor", "rounds": 4, "checkpoint_steps": 10, "steps": 20}
    config, folder = {"text": str(text)} | SETTINGS | how, pruned.parent
    whole = in_two(pruned, folder / "whole", config, dense)
    assert in_two(pruned, folder / "cut", config, dense, cut=13) == {}
    assert not (folder / "cut").exists()
    assert in_two(pruned, folder / "cut", config, dense) == whole | {"resumed": 10}
    one, two = tensors(folder / "whole"), tensors(folder / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)
    in_two(pruned, folder / "other", config, dense, cut=13)
    with pytest.raises(FileExistsError, match="processes: 2 then, None now"):
        retrain(pruned, folder / "other", RetrainConfig(**config), teacher=dense, device="cpu", progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_two_gpus(dense: Path, pruned: Path, text: Path) -> None:
    how = {"sparsity": 0.8, "score": "taylor", "rounds": 3, "compile": True, "gradient_checkpointing": True}
    config = {"text": str(text)} | SETTINGS | how
    alone = retrain(pruned, pruned.parent / "one", RetrainConfig(**config), teacher=dense, progress=False)
    both = in_two(pruned, pruned.parent / "two", config, dense, device="cuda")
    assert both["zeros"] == alone.zeros
    assert both["loss"] == pytest.approx(alone.loss_after, rel=2e-2)


@pytest.mark.parametrize(
    ("how", "words"),
    [({"batch": 3}, "batch=3 windows can't be shared evenly by 2"), ({"lora_rank": 2}, "adapters are trained by one")],
)
def test_what_cannot_be_shared_out_is_refused(how: dict[str, Any], words: str, pruned: Path, text: Path) -> None:
    with pytest.raises(AssertionError, match=words):
        in_two(pruned, pruned.parent / "out", {"text": str(text)} | SETTINGS | how)
    assert not (pruned.parent / "out").exists()


class Threads(Processes):
    """Processes that are threads: what each says stands in a list that all have."""

    def __init__(self, rank: int, said: list[int], everybody: threading.Barrier) -> None:
        super().__init__(len(said), rank)
        self._said, self._everybody = said, everybody

    def _gathered(self, number: int) -> list[int]:
        self._said[self.rank] = number
        self._everybody.wait()
        heard = list(self._said)
        self._everybody.wait()
        return heard


@pytest.mark.parametrize("count", range(9))
def test_of_equal_scores_those_of_the_first_process_are_lowest(count: int) -> None:
    """Of eight equal scores, four in each process."""
    said, everybody = [0, 0], threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        marks = pool.map(lambda rank: lowest_of_all([torch.ones(4)], count, Threads(rank, said, everybody))[0], (0, 1))
    assert torch.cat(list(marks)).tolist() == [True] * count + [False] * (8 - count)
