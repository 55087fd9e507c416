"""Retrain a pruned model's folder into another folder."""

from __future__ import annotations

import shutil
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flash_llm.errors import CheckpointError
from flash_llm.files import write_json, write_whole
from flash_llm.plotting import can_plot
from flash_llm.progress import progress_bar
from flash_llm.prune.calibration import digest, load_ids
from flash_llm.prune.files import check_out, write_tensors
from flash_llm.prune.folder import RECORD, RECORD_VERSION
from flash_llm.prune.job import Job
from flash_llm.prune.retrain.config import RetrainConfig
from flash_llm.prune.retrain.curve import plot
from flash_llm.prune.retrain.data import Batches
from flash_llm.prune.retrain.interrupt import deferred_interrupts
from flash_llm.prune.retrain.lora import add_adapters, merge_adapters
from flash_llm.prune.retrain.masks import Masks
from flash_llm.prune.retrain.model import (
    compile_blocks,
    load_model,
    load_teacher,
    masked_layers,
    open_source,
    read_record,
    stored_names,
)
from flash_llm.prune.retrain.processes import Processes, started, whole
from flash_llm.prune.retrain.state import load_state, save_state
from flash_llm.prune.retrain.trainer import LOG_STEPS, Trainer
from flash_llm.prune.skeleton import Skeleton
from flash_llm.prune.source import SourceFolder
from flash_llm.tokenizer import load_tokenizer

CURVE, PLOT = "retraining.json", "retraining.png"
# A data set is as long as one likes; so much of it is taken if nobody says.
_DATASET_TOKENS = 20_000_000


@dataclass(frozen=True)
class RetrainReport:
    """What :func:`retrain` did.

    Attributes:
        folder: the retrained model.
        steps: of the optimizer.
        tokens: that went through the model, repetitions included.
        loss_before, loss_after: cross-entropy on the windows held back, in nats a token.
        weights: in the pruned layers.
        zeros: among them, as written.
        trained: number of trained parameters.
        seconds: of training, interrupted runs included.
        resumed_step: at which this run went on; 0 if it began.
        peak_bytes: most memory that torch held on the GPU in this run; None on a CPU.
    """

    folder: Path
    steps: int
    tokens: int
    loss_before: float
    loss_after: float
    weights: int
    zeros: int
    trained: int
    seconds: float
    resumed_step: int
    peak_bytes: int | None


def retrain(
    model_dir: str | Path,
    out_dir: str | Path,
    config: RetrainConfig,
    *,
    teacher: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = True,
    progress: bool = True,
) -> RetrainReport:
    """Train a pruned model with its zeros held; write a folder of the same dtypes and the same zeros, bit for bit.

    The pruned layers are those of ``pruning.json``; all else is trained as usual. Until the output is whole, it and the
    checkpoints lie in ``.NAME.partial`` beside ``out_dir``. A run that was killed goes on from its last checkpoint; one
    that is asked to stop (SIGINT, SIGTERM) writes one first. On a CPU with the same number of threads the result is
    then the same, bit for bit; on a GPU some of torch's kernels add in an order that changes from run to run.

    In processes that ``torchrun`` has started, one for each GPU, weights and all that belongs to them are shared out by
    torch's FSDP, and each process takes its part of a batch.

    Args:
        model_dir: dense model with zeros: config.json, safetensors, tokenizer, ``pruning.json``.
        out_dir: folder to make; must not exist, or be empty.
        config: how.
        teacher: folder of the dense model, to distil from.
        device: default: ``cuda`` if there is a GPU, else ``cpu``.
        resume: take up an interrupted run; False: discard it.
        progress: show a bar if standard error is a terminal.

    Returns:
        What was done.

    Raises:
        ValueError: too little text, windows longer than the model's positions, a teacher of another vocabulary, a
            sparsity below the model's, a loss or weights that are not finite; a batch that several processes can't
            share evenly, or adapters in several processes.
        FileNotFoundError: no such model, teacher or text.
        FileExistsError: the output folder is not empty, or an interrupted run had other arguments.
        CheckpointError: the folder is no model, not pruned, compressed, damaged or not supported.
        KeyboardInterrupt: the run was asked to stop; it can be taken up.
    """
    source, out = open_source(Path(model_dir)), Path(out_dir).absolute()
    check_out(out)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    processes, device = started(device)
    _check_processes(processes, config)
    # Of several processes none has room for all: what is to be shared out is loaded beside the GPU.
    home = device if processes.size == 1 else torch.device("cpu")
    skeleton = Skeleton(source, torch.float32, torch.device("cpu"))
    layers = masked_layers(source, skeleton, config)
    tokenizer = load_tokenizer(source.folder)
    if teacher is not None and not config.distill:
        raise ValueError("distill=0 makes no use of a teacher: give it some weight, or leave the teacher out.")
    taught = None if teacher is None else load_teacher(Path(teacher), source, tokenizer, device, home)
    ids = _ids(source, tokenizer, config)
    settings: dict[str, Any] = asdict(config) | {
        "teacher": None if teacher is None else str(Path(teacher).resolve()),
        "sha256": digest(ids),
    }
    data = Batches(ids.to(device), config.seqlen, config.batch, config.validation, config.seed)
    arguments = settings | {"model": [str(source.folder.resolve()), *source.identity()], "device": device.type}
    if processes.size > 1:
        arguments["processes"] = processes.size  # checkpoints are theirs
    job = Job(out, arguments)
    with job.started(resume) if processes.first else nullcontext():
        processes.wait()
        model = load_model(source, home, torch.float32)
        names = stored_names(model, source)
        for each in (model, taught):
            if each is not None:
                if config.compile:
                    compile_blocks(each)
                processes.share_out(each)
        masks = _masks(model, layers, source, processes)
        if config.lora_rank:
            add_adapters(model, masks, config.lora_rank, config.train_norms, config.seed)
        if not config.train_embeddings:
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                if module is not None:
                    module.requires_grad_(False)
        if config.gradient_checkpointing:
            # The new name of the same, where transformers has it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        trainer = Trainer(model, masks, taught, data, config)
        resumed = _take_up(job, trainer)
        _train(job, trainer, progress and processes.first)
        if config.lora_rank:
            merge_adapters(model, masks)
        zeros = _write_weights(job, source, model, names, layers, masks)
        report = _report(out, trainer, zeros, resumed)
        if processes.first:
            _write_rest(job, source, trainer, layers, zeros, settings, report)
            job.deliver()
        processes.wait()
    return report


def _check_processes(processes: Processes, config: RetrainConfig) -> None:
    """That a run can be shared out.

    Raises:
        ValueError: it can't.
    """
    if config.batch % processes.size:
        raise ValueError(
            f"batch={config.batch} windows can't be shared evenly by {processes.size} processes; take a multiple of "
            "their number."
        )
    if processes.size > 1 and config.lora_rank:
        raise ValueError(
            f"lora_rank={config.lora_rank} with {processes.size} processes: adapters are trained by one, since they "
            "need little memory. Start it without torchrun."
        )


def _ids(source: SourceFolder, tokenizer: Any, config: RetrainConfig) -> Tensor:
    """The tokens to train on."""
    text = source.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and config.seqlen > positions:
        raise ValueError(
            f"seqlen={config.seqlen} is longer than the model's {positions} positions; take a smaller one."
        )
    ids = load_ids(config.text, tokenizer, config.tokens or _DATASET_TOKENS, config.seed)[: config.tokens]
    if ids.numel() and int(ids.max()) >= text.vocab_size:
        raise CheckpointError(
            f"{source.folder}: the tokenizer gives token {int(ids.max())}, but the model knows {text.vocab_size} "
            "tokens; the tokenizer belongs to another model."
        )
    return ids


def _masks(model: nn.Module, layers: dict[str, str], source: SourceFolder, processes: Processes) -> Masks:
    """The masks of the layers, whose zeros must be those of the record.

    Raises:
        CheckpointError: a layer has fewer.
    """
    masks = Masks({f"{name}.weight": model.get_parameter(f"{name}.weight") for name in layers}, processes)
    record = read_record(source.folder)
    for name, layer in (record["layers"] if record is not None else {}).items():
        if name in layers and (zeros := masks.zeros(f"{name}.weight")) < layer.get("zeros", 0):
            raise CheckpointError(
                f"{source.folder}: {name} has {zeros} zeros, but {RECORD} says {layer['zeros']}: the weights were "
                "changed after pruning. Prune again."
            )
    return masks


def _take_up(job: Job, trainer: Trainer) -> int:
    """Go on from the last checkpoint, if there is one; the step at which."""
    found = load_state(job.folder, trainer.masks.processes.rank)
    if found is not None:
        trainer.load(*found)
    return trainer.step


def _train(job: Job, trainer: Trainer, progress: bool) -> None:
    """All steps that are left, with checkpoints."""
    config, processes = trainer.config, trainer.masks.processes
    saved = time.monotonic()
    with deferred_interrupts() as asked, progress_bar(progress) as bar:
        task = bar.add_task("retraining", total=trainer.steps, completed=trainer.step)
        while not trainer.done:
            trainer.advance()
            train = trainer.curve["train"]
            words = f"retraining, loss {train[-1]['loss']:.3f}" if train else "retraining"
            bar.update(task, completed=trainer.step, total=trainer.steps, description=words)
            if config.checkpoint_steps is not None:
                due = trainer.step % config.checkpoint_steps == 0
            else:
                due = time.monotonic() - saved > 60 * config.checkpoint_minutes
            stop = asked()
            if processes.size > 1:  # they must agree, and a step shouldn't wait for that
                if trainer.step % LOG_STEPS and not trainer.done:
                    continue
                due, stop = bool(processes.as_first(due)), processes.any(stop)
            # Before the number of steps is known there is nothing that is worth going on from.
            if trainer.steps is not None and (due or stop or trainer.done):
                save_state(job.folder, *trainer.state(), processes)
                saved = time.monotonic()
            if stop and not trainer.done:
                raise KeyboardInterrupt


def _write_weights(
    job: Job, source: SourceFolder, model: nn.Module, names: dict[str, str], layers: dict[str, str], masks: Masks
) -> dict[str, int]:
    """The source's shards with the trained weights in place of its own; zeros of each layer, as written.

    Raises:
        ValueError: a weight overflows its dtype.
    """
    zeros: dict[str, int] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layer_of = {key: name for name, key in layers.items()}
    for shard, keys in source.shards.items():
        tensors = {}
        for key in keys:
            stored = source.read(key)
            if key in names:
                stored = whole(parameters[names[key]].detach()).to(device="cpu", dtype=stored.dtype).contiguous()
                if not bool(stored.isfinite().all()):
                    raise ValueError(
                        f"{key} has values that {stored.dtype} can't hold after training: take a lower lr, or convert "
                        "the model to bfloat16 first."
                    )
            if key in layer_of:
                name = layer_of[key]
                stored = stored.masked_fill(masks.whole(f"{name}.weight").cpu(), 0.0)
                zeros[name] = int((stored == 0).sum())
            if masks.processes.first:
                tensors[key] = stored.clone()
        if masks.processes.first:
            write_tensors(job.model / shard, tensors)
    return zeros


def _report(out: Path, trainer: Trainer, zeros: dict[str, int], resumed: int) -> RetrainReport:
    validation, config = trainer.curve["validation"], trainer.config
    device = next(trainer.model.parameters()).device
    return RetrainReport(
        folder=out,
        steps=trainer.step,
        tokens=trainer.step * config.batch * config.seqlen,
        loss_before=validation[0]["loss"],
        loss_after=validation[-1]["loss"],
        weights=trainer.masks.count(*trainer.masks.weights),
        zeros=sum(zeros.values()),
        trained=trainer.trained,
        seconds=trainer.seconds,
        resumed_step=resumed,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _write_rest(
    job: Job,
    source: SourceFolder,
    trainer: Trainer,
    layers: dict[str, str],
    zeros: dict[str, int],
    settings: dict[str, Any],
    report: RetrainReport,
) -> None:
    """Config, tokenizer, index, the records and the curve."""
    for file in source.side_files():
        if file.name != PLOT:
            shutil.copyfile(file, job.model / file.name)
    source.copy_index(job.model)
    device = next(trainer.model.parameters()).device
    facts = {key: value for key, value in asdict(report).items() if key not in ("folder", "resumed_step")} | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }
    title = f"{job.out.name}: {report.steps} steps of {trainer.config.batch} x {trainer.config.seqlen} tokens"
    curve = {"title": title, "settings": settings, **facts, **trainer.curve}
    write_json(job.model / CURVE, curve)
    if can_plot():
        write_whole(job.model / PLOT, plot(curve))
    else:
        warnings.warn(f"No {PLOT}: matplotlib is not installed (pip install 'flash-llm[bench]').", stacklevel=3)
    if not layers:
        return
    record = read_record(source.folder) or _new_record(trainer.config)
    for name, key in layers.items():
        shape = source.shape(key)
        numbers = {"zeros": zeros[name], "sparsity": zeros[name] / torch.Size(shape).numel()}
        before = {"tensor": key, "shape": shape, "method": record["method"]}
        record["layers"][name] = before | record["layers"].get(name, {}) | numbers
    record |= {"weights": report.weights, "zeros": report.zeros}
    if trainer.config.sparsity is not None:
        record["sparsity"] = trainer.config.sparsity
    record["retraining"] = [*record.get("retraining", []), settings | facts]
    layer_records = record.pop("layers")
    write_json(job.model / RECORD, record | {"layers": layer_records})


def _new_record(config: RetrainConfig) -> dict[str, Any]:
    """The record of a model that was pruned by training alone."""
    return {
        "version": RECORD_VERSION,
        "method": f"{config.schedule}-{config.score}",
        "sparsity": config.sparsity,
        "warnings": [],
        "layers": {},
    }
