"""``flash-llm retrain DIR``."""

from __future__ import annotations

import math
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Schedule(str, Enum):
    """How to prune while training."""

    gradual = "gradual"
    admm = "admm"


class Score(str, Enum):
    """What makes a weight worth keeping."""

    magnitude = "magnitude"
    taylor = "taylor"


class Scope(str, Enum):
    """Which weights compete."""

    layer = "layer"
    global_ = "global"


class Precision(str, Enum):
    """What products are computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def retrain(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Pruned model folder, not compressed.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make; it must not exist, or be empty.")],
    text: Annotated[
        str, typer.Option(help="Text to train on: .txt, .jsonl (also .gz), or a data set as name[:config[:split]].")
    ],
    steps: Annotated[int | None, typer.Option(help="Train so many steps,")] = None,
    epochs: Annotated[float | None, typer.Option(help="or see the text so often,")] = None,
    minutes: Annotated[float | None, typer.Option(help="or train for so long.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Distil from this model too: the dense one.")] = None,
    distill: Annotated[float, typer.Option(help="Weight of the distillation; the rest is cross-entropy.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0,
    sparsity: Annotated[float | None, typer.Option(help="Prune further, to this share of zeros, on the way.")] = None,
    schedule: Annotated[
        Schedule, typer.Option(help='How: "gradual", in rounds; "admm", as one problem of the whole model.')
    ] = Schedule.gradual,
    score: Annotated[
        Score, typer.Option(help='What to keep: the largest weights, or by "taylor" those that the loss needs.')
    ] = Score.magnitude,
    scope: Annotated[
        Scope, typer.Option(help='"layer": every layer gets this sparsity; "global": layers compete.')
    ] = Scope.layer,
    prune_until: Annotated[float, typer.Option(help="Share of the steps after which the zeros are final.")] = 0.6,
    rounds: Annotated[int, typer.Option(help="Of the gradual schedule.")] = 32,
    interval: Annotated[int, typer.Option(help="Steps between two projections of ADMM.")] = 32,
    penalty: Annotated[float, typer.Option(help="Of ADMM, at its end.")] = 0.01,
    lora_rank: Annotated[
        int, typer.Option(help="Train masked adapters of this rank and merge them, not all weights.")
    ] = 0,
    train_norms: Annotated[bool, typer.Option(help="With adapters, train norms and biases too.")] = True,
    train_embeddings: Annotated[
        bool, typer.Option(help="Train the embedding and the output head; rare tokens suffer from it at high rates.")
    ] = True,
    dense: Annotated[bool, typer.Option("--dense", help="Train a model that is not pruned, for comparison.")] = False,
    lr: Annotated[
        float | None, typer.Option(help="Peak of the learning rate.", show_default="3e-4, adapters 1e-3")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Steps in which it rises; at most a tenth of all.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 32,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows in the model at a time: less memory.", show_default="at most 16")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Take so many of the text.", show_default="all; 20 million of a data set")
    ] = None,
    validation: Annotated[int, typer.Option(help="Windows held back to measure the loss with.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    precision: Annotated[Precision, typer.Option(help='"auto": bfloat16 products on a GPU.')] = Precision.auto,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="Use torch.compile: quicker after some minutes.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(help="Write a checkpoint about so often.")] = 5.0,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an interrupted run instead of taking it up.")] = (
        False
    ),
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.')] = "auto",
) -> None:
    """Train a pruned model with its zeros held, so that it recovers; or prune it further while it trains.

    Interrupted, it goes on from its last checkpoint when it is called again with the same arguments.

    \b
    Examples:
      flash-llm retrain PRUNED --text text.txt.gz --epochs 3 --teacher MODEL --out RETRAINED
      flash-llm retrain PRUNED --text text.txt.gz --minutes 30 --sparsity 0.8 --score taylor --out RETRAINED
      flash-llm retrain PRUNED --text text.txt.gz --steps 500 --lora-rank 16 --out RETRAINED
      flash-llm retrain MODEL --text text.txt.gz --minutes 30 --dense --out BASELINE
      torchrun --nproc-per-node 4 -m flash_llm retrain PRUNED --text text.txt.gz --epochs 3 --out RETRAINED
    """
    from flash_llm.cli import tame_transformers, usable_device
    from flash_llm.prune.retrain import RetrainConfig
    from flash_llm.prune.retrain import retrain as run
    from flash_llm.prune.retrain.processes import is_first

    tame_transformers()
    config = RetrainConfig(
        text,
        steps=steps,
        epochs=epochs,
        minutes=minutes,
        seqlen=seqlen,
        batch=batch,
        micro_batch=micro_batch,
        tokens=tokens,
        validation=validation,
        seed=seed,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        distill=distill,
        temperature=temperature,
        lora_rank=lora_rank,
        train_norms=train_norms,
        train_embeddings=train_embeddings,
        dense=dense,
        sparsity=sparsity,
        schedule=schedule.value,
        score=score.value,
        scope=scope.value,
        prune_until=prune_until,
        rounds=rounds,
        interval=interval,
        penalty=penalty,
        precision=precision.value,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_,
        checkpoint_minutes=checkpoint_minutes,
    )
    report = run(model, out, config, teacher=teacher, device=usable_device(device), resume=not restart)
    if not is_first():
        return
    zeros = f", {report.zeros:,} of {report.weights:,} weights are zero" if report.weights else ""
    print(
        f"{report.steps} steps, {report.tokens:,} tokens in {report.seconds / 60:.1f} min: "
        f"perplexity on held-back text {math.exp(report.loss_before):.3f} -> {math.exp(report.loss_after):.3f}{zeros}",
        file=sys.stderr,
    )
    print(out)
