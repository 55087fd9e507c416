"""What retraining is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Score = Literal["magnitude", "taylor"]
Scope = Literal["layer", "global"]
Schedule = Literal["gradual", "admm"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class RetrainConfig:
    """How a pruned model is retrained.

    Attributes:
        text: a text file, or a data set as ``name[:config[:split]]``, as in :class:`CalibrationConfig`.
        steps, epochs, minutes: how long; exactly one. ``minutes`` of training are turned into a number of steps once
            the first ones have been timed; from there on the run is the same as one of so many steps.
        seqlen: tokens in a window.
        batch: windows in a step of the optimizer.
        micro_batch: windows in the model at a time; divides ``batch``. Default: 16, or ``batch`` if that is less.
        tokens: take so many tokens of the text. Default: all of a file, 20 million of a data set.
        validation: windows at the end of the text that are not trained on, to measure the loss with.
        seed: of the order of the windows, of the adapters' first values, and of dropout.
        lr: peak of the learning rate. Default: 3e-4, and 1e-3 with adapters.
        final_lr: where its cosine ends, as a share of the peak.
        warmup: steps in which it rises from zero; at most a tenth of all steps.
        weight_decay: of matrices, as in AdamW (arXiv 1711.05101).
        clip: largest norm of the gradient.
        distill: weight of the distillation loss if there is a teacher, and one less that of cross-entropy; 0 to 1.
        temperature: of the distillation.
        lora_rank: train masked adapters of this rank and merge them (PERP, arXiv 2312.15230). 0: train all weights.
        train_norms: with adapters, train norms and biases too.
        train_embeddings: train the embedding and the output head, which pruning left as they were. Adam moves the rows
            of tokens that the text hardly has as far as any other's.
        dense: the model is meant to have no pruned layers: train it as it is, for comparison.
        sparsity: prune further to this share of zeros while training. Default: hold the zeros that are there.
        schedule: how. "gradual": in rounds, by the cubic of arXiv 1710.01878. "admm": an optimum of the loss under the
            constraint, in the way of ELSA (arXiv 2510.01650).
        score: what makes a weight worth keeping. "magnitude": its absolute value. "taylor": the change of the loss
            without it, to first order (arXiv 1906.10771); see the schedules.
        scope: "layer": each layer has the same share of zeros. "global": layers compete.
        prune_until: share of the steps after which the zeros are final.
        rounds: of the gradual schedule.
        interval: steps between two projections of the ADMM schedule.
        penalty: of the ADMM schedule: lambda of the augmented Lagrangian, to which it rises from zero as a cosine.
        precision: of the products: "bfloat16" under autocast, weights and optimizer being float32. "auto": bfloat16
            on a GPU, float32 on a CPU.
        gradient_checkpointing: keep a block's inputs alone and compute the rest again: less memory, a third more time.
        compile: use ``torch.compile`` on the model's blocks and the loss.
        checkpoint_minutes: write a checkpoint about so often.
        checkpoint_steps: write one every so many steps instead.

    Raises:
        ValueError: a value out of range, or two that exclude each other.
    """

    text: str
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    seqlen: int = 1024
    batch: int = 32
    micro_batch: int | None = None
    tokens: int | None = None
    validation: int = 32
    seed: int = 0
    lr: float | None = None
    final_lr: float = 0.05
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    distill: float = 0.5
    temperature: float = 1.0
    lora_rank: int = 0
    train_norms: bool = True
    train_embeddings: bool = True
    dense: bool = False
    sparsity: float | None = None
    schedule: Schedule = "gradual"
    score: Score = "magnitude"
    scope: Scope = "layer"
    prune_until: float = 0.6
    rounds: int = 32
    interval: int = 32
    penalty: float = 0.01
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", str(self.text))
        self._check_length()
        for name, least in (
            ("seqlen", 2),
            ("batch", 1),
            ("validation", 1),
            ("warmup", 0),
            ("lora_rank", 0),
            ("rounds", 1),
            ("interval", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        for name in ("lr", "clip", "temperature", "penalty", "checkpoint_minutes", "checkpoint_steps", "tokens"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value} must be more than 0.")
        for name in ("distill", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1.")
        if not 0 < self.prune_until <= 1:
            raise ValueError(f"prune_until={self.prune_until} must be more than 0 and at most 1.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative.")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise ValueError(f"micro_batch={self.micro_batch} must divide batch={self.batch}.")
        choices = {"schedule": Schedule, "score": Score, "scope": Scope, "precision": Precision}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(choice))}.")
        self._check_sparsity()

    @property
    def peak_lr(self) -> float:
        """The learning rate that is reached after the warm-up."""
        return self.lr if self.lr is not None else 1e-3 if self.lora_rank else 3e-4

    @property
    def windows_at_once(self) -> int:
        """Windows in the model at a time."""
        if self.micro_batch is not None:
            return self.micro_batch
        return max(size for size in range(1, min(self.batch, 16) + 1) if self.batch % size == 0)

    def _check_length(self) -> None:
        given = {name: getattr(self, name) for name in ("steps", "epochs", "minutes")}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise ValueError(f"Say how long to train by one of steps, epochs and minutes, not by {named or 'none'}.")
        for name, value in named.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be more than 0.")

    def _check_sparsity(self) -> None:
        if self.sparsity is None:
            return
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity} must be more than 0 and less than 1.")
        if self.dense:
            raise ValueError(f"dense=True trains a model without zeros: leave it out, or sparsity={self.sparsity}.")
        if self.lora_rank:
            raise ValueError(
                f"lora_rank={self.lora_rank} holds the zeros that are there: to prune further while training "
                "(sparsity), train all weights, or prune first and retrain after."
            )
