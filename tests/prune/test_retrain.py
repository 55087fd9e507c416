"""Retraining: what is held, what is learned, and that a run that was cut off ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flash_llm.errors import CheckpointError
from flash_llm.prune import prune_folder
from flash_llm.prune.job import Job
from flash_llm.prune.retrain import RetrainConfig, retrain
from flash_llm.prune.retrain.state import load_state
from flash_llm.prune.retrain.trainer import Trainer

from .conftest import tensors

Make = Callable[..., Path]


def layers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pruning.json").read_text())["layers"]


def settings(text: Path, **changes: Any) -> RetrainConfig:
    small = {"steps": 12, "batch": 4, "micro_batch": 2, "seqlen": 32, "validation": 2, "lr": 1e-2}
    return RetrainConfig(str(text), **small | changes)


@pytest.fixture
def learnable(tmp_path: Path) -> Path:
    """A text that is easy to learn."""
    path = tmp_path / "easy.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return path


@pytest.fixture
def pruned(make_model: Make, tmp_path: Path) -> Path:
    return make_pruned(make_model("llama", dtype=torch.float16), tmp_path / "pruned", 0.7)


def make_pruned(dense: Path, out: Path, sparsity: float) -> Path:
    prune_folder(dense, out, "magnitude", sparsity, progress=False)
    return out


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"weight_decay": 0.5, "gradient_checkpointing": True},
        {"lora_rank": 3},
        {"precision": "bfloat16"},
        {"seed": 1, "lora_rank": 3, "train_norms": False},
    ],
)
def test_zeros_stay_and_the_loss_falls(how: dict[str, Any], pruned: Path, learnable: Path, tmp_path: Path) -> None:
    report = retrain(pruned, tmp_path / "out", settings(learnable, **how), progress=False)
    before, after = tensors(pruned), tensors(tmp_path / "out")
    assert list(after) == list(before)
    for name, layer in layers(pruned).items():
        old, new = before[layer["tensor"]], after[layer["tensor"]]
        zero = old == 0
        assert torch.equal(old[zero].view(torch.int16), new[zero].view(torch.int16)), name
        assert not torch.equal(old, new)
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert report.loss_after < report.loss_before - 0.3
    assert report.zeros == sum(int((after[layer["tensor"]] == 0).sum()) for layer in layers(pruned).values())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in before if before[name].dim() == 1}
    weights = {layer["tensor"] for layer in layers(pruned).values()}
    with_adapters = weights | (norms if how.get("train_norms", True) else set())
    assert moved == (with_adapters if "lora_rank" in how else set(before))


@pytest.mark.parametrize("architecture", ["llama", "opt"])  # a head of its own, and a tied one
def test_embeddings_stay_on_request(architecture: str, make_model: Make, learnable: Path, tmp_path: Path) -> None:
    folder = make_pruned(make_model(architecture), tmp_path / "pruned", 0.5)
    report = retrain(folder, tmp_path / "out", settings(learnable, train_embeddings=False), progress=False)
    assert report.loss_after < report.loss_before
    before, after = tensors(folder), tensors(tmp_path / "out")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "embed_tokens" in name or "lm_head" in name} <= still
    assert not {layer["tensor"] for layer in layers(folder).values()} & still


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "gpt_neox"])
def test_other_architectures(architecture: str, make_model: Make, learnable: Path, tmp_path: Path) -> None:
    """Tied heads, biases, dropout, and GPT-2's weights, which are stored the other way round."""
    folder = make_pruned(make_model(architecture), tmp_path / "pruned", 0.5)
    report = retrain(folder, tmp_path / "out", settings(learnable, steps=8), teacher=folder, progress=False)
    assert report.loss_after < report.loss_before
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert all(bool((after[x["tensor"]][before[x["tensor"]] == 0] == 0).all()) for x in layers(folder).values())
    first, again = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert {name for name, _ in first.named_parameters()} == {name for name, _ in again.named_parameters()}


def test_the_output_says_what_was_done(pruned: Path, learnable: Path, tmp_path: Path) -> None:
    retrain(pruned, tmp_path / "one", settings(learnable, steps=2), progress=False)
    report = retrain(tmp_path / "one", tmp_path / "out", settings(learnable), teacher=pruned, progress=False)
    out = tmp_path / "out"
    record = json.loads((out / "pruning.json").read_text())
    assert [run["steps"] for run in record["retraining"]] == [2, 12]
    assert record["retraining"][1]["teacher"] == str(pruned)
    assert record["method"] == "magnitude"
    assert record["zeros"] == report.zeros
    curve = json.loads((out / "retraining.json").read_text())
    assert curve["validation"][0] == {"step": 0, "loss": report.loss_before}
    assert curve["validation"][-1] == {"step": 12, "loss": report.loss_after}
    assert [row["step"] for row in curve["train"]][-1] == 12
    assert (out / "retraining.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "tokenizer.json").read_bytes() == (pruned / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_dense_model_is_trained_for_comparison(make_model: Make, learnable: Path, tmp_path: Path) -> None:
    folder = make_model("llama")
    report = retrain(folder, tmp_path / "out", settings(learnable, dense=True), progress=False)
    assert (report.weights, report.zeros) == (0, 0)
    assert report.loss_after < report.loss_before
    assert not (tmp_path / "out" / "pruning.json").exists()


def test_minutes_become_steps(pruned: Path, learnable: Path, tmp_path: Path) -> None:
    report = retrain(pruned, tmp_path / "out", settings(learnable, steps=None, minutes=0.03), progress=False)
    assert report.steps > 24
    assert json.loads((tmp_path / "out" / "retraining.json").read_text())["train"][-1]["step"] == report.steps


@pytest.mark.parametrize("schedule", ["gradual", "admm"])
@pytest.mark.parametrize("length", [{"steps": 1}, {"steps": 5}, {"steps": None, "minutes": 1e-4}])
def test_the_sparsity_is_reached_however_short_the_run(
    length: dict[str, Any], schedule: Any, pruned: Path, learnable: Path, tmp_path: Path
) -> None:
    config = settings(learnable, sparsity=0.9, schedule=schedule, **length)
    report = retrain(pruned, tmp_path / "out", config, progress=False)
    assert report.zeros / report.weights == pytest.approx(0.9, abs=1e-3)


CUTS: dict[str, dict[str, Any]] = {
    "hold": {},
    "dropout": {"architecture": "opt"},
    "lora": {"lora_rank": 2},
    "taylor": {"sparsity": 0.9, "score": "taylor", "rounds": 4, "scope": "global"},
    "admm": {"sparsity": 0.9, "schedule": "admm", "score": "taylor", "interval": 2, "prune_until": 0.9},
    "after admm": {"sparsity": 0.9, "schedule": "admm", "interval": 2, "prune_until": 0.3},
}


@pytest.mark.parametrize("case", CUTS)
def test_going_on_equals_never_having_stopped(
    case: str, make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = dict(CUTS[case])
    dense = make_model(how.pop("architecture", "llama"))
    folder = make_pruned(dense, tmp_path / "pruned", 0.5)
    config = settings(text, checkpoint_steps=3, **how)
    # On a CPU: some kernels of a GPU add in another order each time.
    arguments: dict[str, Any] = {"teacher": dense, "device": "cpu", "progress": False}
    whole = retrain(folder, tmp_path / "whole", config, **arguments)

    advance = Trainer.advance

    def cut(self: Trainer) -> None:
        if self.step == 7:  # a checkpoint was written at 6
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", cut)
        with pytest.raises(KeyboardInterrupt):
            retrain(folder, tmp_path / "cut", config, **arguments)
    assert not (tmp_path / "cut").exists()
    report = retrain(folder, tmp_path / "cut", config, **arguments)
    assert (report.resumed_step, report.loss_after) == (6, whole.loss_after)
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint(
    pruned: Path, learnable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, handlers = Trainer.advance, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def stopped(self: Trainer) -> None:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stopped)
        with pytest.raises(KeyboardInterrupt):
            retrain(pruned, tmp_path / "cut", settings(learnable), device="cpu", progress=False)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert retrain(pruned, tmp_path / "cut", settings(learnable), device="cpu", progress=False).resumed_step == 5
    retrain(pruned, tmp_path / "whole", settings(learnable), device="cpu", progress=False)
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_process_is_taken_up(pruned: Path, learnable: Path, tmp_path: Path) -> None:
    """SIGKILL at whatever point it is when the first checkpoint is there."""
    script = (
        "import sys; from flash_llm.prune.retrain import *\n"
        "retrain(sys.argv[1], sys.argv[2], RetrainConfig(sys.argv[3], steps=60, batch=4, micro_batch=2, seqlen=32,"
        " validation=2, lr=1e-2, checkpoint_steps=4), device='cpu')"
    )
    command = [sys.executable, "-c", script, pruned, tmp_path / "cut", learnable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list((tmp_path / ".cut.partial").glob("state-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    config = settings(learnable, steps=60, checkpoint_steps=4)
    found = load_state(tmp_path / ".cut.partial")
    assert found is not None
    report = retrain(pruned, tmp_path / "cut", config, device="cpu", progress=False)
    assert (report.steps, report.resumed_step) == (60, found[1]["step"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how",
    [
        {"compile": True},
        {"gradient_checkpointing": True, "lora_rank": 3},
        {"sparsity": 0.9, "score": "taylor", "scope": "global", "rounds": 3},
        {"sparsity": 0.9, "schedule": "admm", "score": "taylor", "interval": 2},
    ],
)
def test_on_a_gpu(how: dict[str, Any], pruned: Path, learnable: Path, tmp_path: Path) -> None:
    """bfloat16 under autocast, the fused optimizer, and a checkpoint taken up."""
    config = settings(learnable, steps=30, checkpoint_steps=10, **how)
    whole = retrain(pruned, tmp_path / "whole", config, teacher=pruned, device="cuda", progress=False)
    assert whole.loss_after < whole.loss_before - 0.3
    assert whole.peak_bytes
    assert whole.zeros >= sum(layer["zeros"] for layer in layers(pruned).values())
    before, after = tensors(pruned), tensors(tmp_path / "whole")
    assert all(bool((after[x["tensor"]][before[x["tensor"]] == 0] == 0).all()) for x in layers(pruned).values())

    advance = Trainer.advance
    with pytest.MonkeyPatch.context() as patch:

        def cut(self: Trainer) -> None:
            if self.step == 15:
                raise KeyboardInterrupt
            advance(self)

        patch.setattr(Trainer, "advance", cut)
        with pytest.raises(KeyboardInterrupt):
            retrain(pruned, tmp_path / "cut", config, teacher=pruned, device="cuda", progress=False)
    report = retrain(pruned, tmp_path / "cut", config, teacher=pruned, device="cuda", progress=False)
    assert report.resumed_step == 10
    assert report.loss_after == pytest.approx(whole.loss_after, abs=0.1)


def test_another_run_is_not_mixed_in(
    pruned: Path, learnable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Job, "deliver", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            retrain(pruned, tmp_path / "out", settings(learnable), progress=False)
    with pytest.raises(FileExistsError, match=r"lr: 0\.01 then, 0\.02 now"):
        retrain(pruned, tmp_path / "out", settings(learnable, lr=0.02), progress=False)
    assert retrain(pruned, tmp_path / "out", settings(learnable, lr=0.02), resume=False, progress=False).steps == 12


def test_a_loss_that_is_no_number_is_named(pruned: Path, learnable: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss is (nan|inf).* at step \d+: take a lower lr than 1e\+30"):
        retrain(pruned, tmp_path / "out", settings(learnable, lr=1e30, warmup=0), progress=False)
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_are_not_written(make_model: Make, learnable: Path, tmp_path: Path) -> None:
    folder = make_pruned(make_model("llama", dtype=torch.float16), tmp_path / "pruned", 0.5)
    with pytest.raises(ValueError, match="float16 can't hold"):
        retrain(folder, tmp_path / "out", settings(learnable, lr=1e6, final_lr=1.0, steps=1), progress=False)
    assert not (tmp_path / "out").exists()


def compressed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "flash_llm"}}))


def filled(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


SPOILT: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "not pruned": (lambda folder: (folder / "pruning.json").unlink(), CheckpointError, "not pruned: it has no pruning"),
    "compressed": (compressed, CheckpointError, "flash-llm decompress"),
    "zeros filled since": (filled, CheckpointError, "changed after pruning"),
    "no record": (lambda folder: (folder / "pruning.json").write_text("{}"), CheckpointError, "damaged"),
    "no tokenizer": (lambda folder: [f.unlink() for f in folder.glob("tokenizer*")], CheckpointError, "tokenizer"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_folders_that_do_not_do(case: str, pruned: Path, learnable: Path, tmp_path: Path) -> None:
    spoil, error, words = SPOILT[case]
    spoil(pruned)
    with pytest.raises(error, match=words):
        retrain(pruned, tmp_path / "out", settings(learnable), progress=False)
    assert not (tmp_path / "out").exists()


def test_teachers_that_do_not_do(make_model: Make, pruned: Path, learnable: Path, tmp_path: Path) -> None:
    config, out = settings(learnable), tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"Teacher .*nobody does not exist"):
        retrain(pruned, out, config, teacher=tmp_path / "nobody", progress=False)
    with pytest.raises(ValueError, match=r"knows 300 tokens, .* 256: .*same vocabulary"):
        retrain(pruned, out, config, teacher=make_model("llama", vocab_size=300), progress=False)
    with pytest.raises(ValueError, match="makes no use of a teacher"):
        retrain(pruned, out, settings(learnable, distill=0.0), teacher=pruned, progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": None}, "one of steps, epochs and minutes, not by none"),
        ({"epochs": 1}, "one of steps, epochs and minutes"),
        ({"steps": 0}, "steps=0 must be more than 0"),
        ({"micro_batch": 3}, "micro_batch=3 must divide batch=4"),
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"distill": 1.5}, r"distill=1\.5 must be from 0 to 1"),
        ({"score": "luck"}, "'luck' must be one of magnitude, taylor"),
        ({"sparsity": 1.0}, r"sparsity=1\.0"),
        ({"sparsity": 0.8, "lora_rank": 2}, "lora_rank=2 holds the zeros"),
        ({"sparsity": 0.8, "dense": True}, "dense=True"),
        ({"sparsity": 0.6}, r"sparsity=0\.6 is no more than the model has"),
        ({"dense": True}, "is pruned, and dense=True would fill its zeros"),
        ({"lora_rank": 36}, "lora_rank=36 must be less"),
        ({"seqlen": 65}, "longer than the model's 64 positions"),
        ({"validation": 200}, "tokens; 200 windows of 32"),
    ],
)
def test_arguments_that_do_not_do(
    changes: dict[str, Any], words: str, pruned: Path, learnable: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        retrain(pruned, tmp_path / "out", settings(learnable, **changes), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_missing_text_is_found_before_anything_is_written(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        retrain(pruned, tmp_path / "out", settings(Path("none.txt")), progress=False)
    assert not list(tmp_path.glob(".out*"))
