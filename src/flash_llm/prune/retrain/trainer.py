"""The training loop: one step after the other, on a process's own device, without waiting for it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.prune.retrain.admm import Admm
from flash_llm.prune.retrain.config import RetrainConfig
from flash_llm.prune.retrain.data import Batches, mixed
from flash_llm.prune.retrain.loss import language_loss
from flash_llm.prune.retrain.masks import Masks
from flash_llm.prune.retrain.processes import own
from flash_llm.prune.retrain.schedule import Gradual, Hold, Schedule, Targets
from flash_llm.prune.retrain.state import load_optimizer, optimizer_state

# Steps that are not timed, since much is made ready in them, and those after them that are.
_UNTIMED, _TIMED = 8, 16
# What validating and writing may take of a budget of minutes.
_RESERVE = 0.05
LOG_STEPS = 10
"""Every so many steps losses are fetched, and processes, if there are several, ask each other what is next."""
_VALIDATIONS = 10


class Trainer:
    """A model in training: what changes from step to step, and how.

    Weights, gradients and AdamW's moments are float32: 16 bytes a trained weight, one more for the mask, and the
    activations. Losses stay on the device; every tenth step they are fetched and looked at.

    Args:
        model: a causal language model of transformers in float32, on its device, with adapters if there are to be any;
            or shared out to several processes, each of which then takes its part of a batch's windows.
        masks: of its pruned layers, which know the processes.
        teacher: what to distil from; None: cross-entropy alone.
        data: what to train on.
        config: the rest.

    Attributes:
        step: steps done.
        steps: of the whole run; None until a budget of minutes has been turned into steps.
        curve: ``"train"`` and ``"validation"``, as :func:`flash_llm.prune.retrain.curve.plot` wants them.
        seconds: of training, interrupted runs included.
    """

    def __init__(
        self, model: nn.Module, masks: Masks, teacher: nn.Module | None, data: Batches, config: RetrainConfig
    ) -> None:
        self.model, self.masks, self.data, self.config = model, masks, data, config
        self._teacher = teacher
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._device = next(model.parameters()).device
        self._optimizer = _optimizer(self._trained.values(), config, self._device)
        self._targets = Targets(masks, config.sparsity, config.scope) if config.sparsity is not None else None
        self.schedule: Schedule = Hold()
        self.step, self.seconds = 0, 0.0
        self.steps: int | None = None
        self.curve: dict[str, list[dict[str, float]]] = {"train": [], "validation": []}
        self._pending: list[tuple[int, Tensor]] = []
        self._timed_from = 0.0
        if config.minutes is None:
            self._plan(config.steps if config.steps is not None else data.steps(config.epochs or 1.0))

    @property
    def trained(self) -> int:
        """Number of parameters that are trained."""
        return sum(weight.numel() for weight in self._trained.values())

    @property
    def done(self) -> bool:
        """Whether all steps are."""
        return self.steps is not None and self.step >= self.steps

    def advance(self) -> None:
        """One step of the optimizer.

        Raises:
            ValueError: the loss of this or one of the last steps is not finite.
        """
        start = time.perf_counter()
        if self.step == 0:
            self.validate()
        self._batch(self.step + 1)
        self.step += 1
        if self.step % LOG_STEPS == 0 or self.done:
            self._fetch()
        self.seconds += time.perf_counter() - start
        if self.steps is None:
            self._time()
        if self.steps is not None and (self.done or self.step % math.ceil(self.steps / _VALIDATIONS) == 0):
            start = time.perf_counter()
            self.validate()
            self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def validate(self) -> float:
        """Cross-entropy over the windows that are not trained on, in nats a token; goes to the curve."""
        self._fetch()
        self.model.eval()
        size, losses = self.config.windows_at_once, []
        for windows in self.data.validation.split(size):
            with self._autocast():
                logits = self.model(input_ids=windows, use_cache=False).logits
            losses.append(language_loss(logits, windows, compiled=self.config.compile)[1] * len(windows))
        loss = float(torch.stack(losses).sum()) / len(self.data.validation)
        if not math.isfinite(loss):
            raise ValueError(self._not_finite("validation loss", loss, self.step))
        self.curve["validation"].append({"step": self.step, "loss": loss})
        return loss

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which :meth:`load` goes on, bit for bit, once the number of steps is known.

        Raises:
            ValueError: a loss since the last look was not finite.
        """
        self._fetch()
        tensors = {f"weight.{name}": weight.detach() for name, weight in self._trained.items()}
        tensors |= optimizer_state(self._optimizer) | self.masks.state() | self.schedule.state()
        numbers = {"step": self.step, "steps": self.steps, "seconds": self.seconds, "curve": self.curve}
        return tensors, numbers

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take up :meth:`state`."""
        for name, weight in self._trained.items():
            own(weight.data).copy_(tensors[f"weight.{name}"])
        load_optimizer(self._optimizer, tensors)
        self._plan(numbers["steps"])
        self.masks.load(tensors)
        self.schedule.load(tensors)
        self.step, self.seconds, self.curve = numbers["step"], numbers["seconds"], numbers["curve"]

    def sparsity(self) -> float:
        """Share of dropped weights in the masked layers; 0 if there are none."""
        return self.masks.zeros(*self.masks.weights) / max(1, self.masks.count(*self.masks.weights))

    def _batch(self, step: int) -> None:
        """Gradients of a batch, and what the optimizer and the masks make of them."""
        processes = self.masks.processes
        # Of dropout, where a model has it; by the step, so that no state of generators needs to be kept.
        torch.manual_seed(mixed(self.config.seed, step * processes.size + processes.rank))
        self.model.train()
        batch = self.data(step - 1)[processes.rank :: processes.size]
        loss = torch.zeros((), device=self._device)
        for windows in batch.split(self.config.windows_at_once):
            part = self._loss(windows) / (len(batch) / len(windows))  # a process's last part may be smaller
            part.backward()
            loss += part.detach()
        self.schedule.after_backward(step)
        self.masks.hold_gradients()
        nn.utils.clip_grad_norm_(list(self._trained.values()), self.config.clip)
        if self.schedule.before_update(step):
            self.masks.hold_gradients()
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.masks.hold_weights()
        self.schedule.after_update(step)
        self._pending.append((step, loss))

    def _loss(self, windows: Tensor) -> Tensor:
        with self._autocast():
            logits = self.model(input_ids=windows, use_cache=False).logits
        taught = None
        if self._teacher is not None:
            with torch.no_grad():
                taught = self._teacher(input_ids=windows, use_cache=False).logits
        config = self.config
        return language_loss(logits, windows, taught, config.distill, config.temperature, config.compile)[0]

    def _lr(self, step: int) -> float:
        """A linear rise, then a cosine down to ``final_lr``."""
        config = self.config
        # While the number of steps isn't known, the rise is as long as it may get.
        warmup = config.warmup if self.steps is None else min(config.warmup, self.steps // 10)
        if step <= warmup or self.steps is None:
            return config.peak_lr * min(1.0, step / max(1, warmup))
        progress = (step - warmup) / max(1, self.steps - warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return config.peak_lr * (config.final_lr + (1 - config.final_lr) * cosine)

    def _plan(self, steps: int) -> None:
        """Fix the number of steps, and with it the schedule."""
        self.steps = steps
        if self._targets is None:
            return
        config = self.config
        end = max(1, round(config.prune_until * steps))
        begin = max(1, min(config.warmup, end // 10))
        if config.minutes is not None:  # the first steps were taken before there was a plan
            begin = max(begin, _UNTIMED + _TIMED + 1)
            end = max(begin, end)
            self.steps = max(end, steps)
        if config.schedule == "gradual":
            self.schedule = Gradual(self.masks, self._targets, config.score, begin, end, config.rounds)
        else:
            self.schedule = Admm(
                self.masks,
                self._targets,
                self._optimizer,
                config.score,
                config.penalty,
                config.interval,
                begin,
                end,
            )

    def _time(self) -> None:
        """Turn the minutes into steps as soon as some steps have been timed."""
        if self.step == _UNTIMED:
            self._wait()
            self._timed_from = time.perf_counter()
        elif self.step >= _UNTIMED + _TIMED:
            self._wait()
            each = (time.perf_counter() - self._timed_from) / _TIMED
            budget = 60 * (self.config.minutes or 0.0)
            steps = max(self.step + 1, self.step + int(((1 - _RESERVE) * budget - self.seconds) / each))
            self._plan(self.masks.processes.as_first(steps))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _fetch(self) -> None:
        """Fetch the losses of the last steps, and look at them."""
        if not self._pending:
            return
        losses = self.masks.processes.mean(torch.stack([loss for _, loss in self._pending])).tolist()
        steps = [step for step, _ in self._pending]
        self._pending.clear()
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(self._not_finite("loss", loss, step))
        mean = sum(losses) / len(losses)
        self.curve["train"].append({"step": steps[-1], "loss": mean, "sparsity": self.sparsity()})

    def _not_finite(self, what: str, loss: float, step: int) -> str:
        return (
            f"The {what} is {loss} at step {step}: take a lower lr than {self.config.peak_lr} or a smaller clip than "
            f"{self.config.clip}; if it is so from the first step on, the model's weights overflow."
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.config.precision
        bfloat16 = precision == "bfloat16" or (precision == "auto" and self._device.type != "cpu")
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bfloat16)


def _optimizer(weights: Any, config: RetrainConfig, device: torch.device) -> torch.optim.AdamW:
    weights = list(weights)
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), fused=device.type == "cuda")
