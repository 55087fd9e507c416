"""Prune a model's folder into another folder."""

from __future__ import annotations

import re
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flash_llm.errors import CheckpointError
from flash_llm.files import write_json
from flash_llm.layers import matrix
from flash_llm.progress import progress_bar
from flash_llm.prune import alps, magnitude, sparsegpt, wanda  # noqa: F401  importing a method registers it
from flash_llm.prune.allocate import ALLOCATIONS, Allocation
from flash_llm.prune.calibration import CalibrationConfig, digest, load_windows
from flash_llm.prune.files import check_out, data_bytes, write_tensors
from flash_llm.prune.job import Job
from flash_llm.prune.method import METHODS, Pruner
from flash_llm.prune.quantise import quantise
from flash_llm.prune.skeleton import Skeleton
from flash_llm.prune.source import SourceFolder
from flash_llm.prune.statistics import Collector, Statistics
from flash_llm.prune.survey import check_finite, read_finite, survey
from flash_llm.prune.walk import Walk
from flash_llm.tensor import ValueKind
from flash_llm.tensor.quantise import SCALES
from flash_llm.tokenizer import load_tokenizer

RECORD = "pruning.json"
RECORD_VERSION = 1
# Config, tokenizer and the file system's own needs.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerReport:
    """What became of a linear layer.

    Attributes:
        tensor: name of its weight in the safetensors files.
        shape: of the weight as stored.
        zeros: number of zeros, those that it had before included.
        sparsity: share of zeros.
        method: that was used; differs from the job's if the layer saw no calibration data.
    """

    tensor: str
    shape: list[int]
    zeros: int
    sparsity: float
    method: str


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune_folder` did.

    Attributes:
        folder: the pruned model.
        method: name of the method.
        sparsity: that was asked for.
        layers: by the layers' names.
        weights: number of weights in these layers.
        zeros: number of zeros among them.
        warnings: all that did not go as asked, in words.
        resumed_stages: blocks that an interrupted run had finished before.
        seconds: wall-clock time of this run.
        stage_seconds: of that, for each block that this run pruned, and the head.
        peak_bytes: most memory that torch held on the GPU in this run; None on a CPU.
    """

    folder: Path
    method: str
    sparsity: float
    layers: dict[str, LayerReport]
    weights: int
    zeros: int
    warnings: list[str]
    resumed_stages: int
    seconds: float
    stage_seconds: list[float]
    peak_bytes: int | None


@dataclass
class _Stage:
    """A part of the model that is pruned and written as one: a block, or the head."""

    module: str
    layers: dict[str, str] = field(default_factory=dict)  # layers to prune, and the stored names of their weights


def prune_folder(
    model_dir: str | Path,
    out_dir: str | Path,
    method: str | Pruner = "wanda",
    sparsity: float = 0.5,
    *,
    allocation: str | Allocation = "uniform",
    calibration: CalibrationConfig | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    include_lm_head: bool = False,
    skip: Sequence[str] = (),
    values: str | ValueKind = ValueKind.BITS16,
    resume: bool = True,
    progress: bool = True,
) -> PruneReport:
    """Prune the linear layers of a decoder's blocks; write a Hugging Face folder of the same dtypes with zeros in it.

    Block after block is loaded, pruned and written, so that a model needs no more memory than one block and the
    calibration data's hidden states (``samples * seqlen * width`` elements, on the CPU). A block's statistics come
    from data that went through the already pruned blocks before it. The output has a shard a block, and
    ``pruning.json``, which says what was done. Until it is whole it lies in ``.NAME.partial`` beside ``out_dir``; a run
    that was killed goes on there from the last finished block, with the same result, bit for bit.

    Args:
        model_dir: dense model: config.json and safetensors; a tokenizer if the method needs calibration data.
        out_dir: folder to make; must not exist, or be empty.
        method: a name in ``METHODS``, or a method with options, such as ``Magnitude(per_row=True)``.
        sparsity: share of zeros, in [0, 1).
        allocation: how it is spread over the blocks' layers: a name in ``ALLOCATIONS``, or an allocation with options.
            The head has ``sparsity`` itself.
        calibration: text for methods and allocations that need it; not used by others.
        device: where blocks run; default: ``cuda`` if there is a GPU, else ``cpu``.
        dtype: in which blocks run; weights are pruned and kept in their own dtype. Default: float32 on a CPU, elsewhere
            the model's if that is float16 or bfloat16, else float32.
        include_lm_head: prune the output head too. Embeddings are never pruned.
        skip: regular expressions; layers in whose full name one is found stay dense.
        values: "float8_e4m3" or "int8" also rounds what is left to that, with a scale for each row, see
            :func:`flash_llm.prune.quantise.quantise`. Weights are still written in their own dtype; the scales are kept
            beside them in ``scales.safetensors``, with which ``compress_folder`` stores just these values.
        resume: take up an interrupted run; False: discard it.
        progress: show a bar if standard error is a terminal.

    Returns:
        What was done.

    Raises:
        ValueError: sparsity out of range, unknown method, allocation or values, missing or too little calibration data,
            a pattern that is no regular expression or matches nothing, a model without linear layers, NaN or infinite
            weights or activations, a tied head that is to be pruned.
        FileNotFoundError: no such model folder or calibration file.
        FileExistsError: the output folder is not empty, or an interrupted run had other arguments.
        CheckpointError: the folder is no model, damaged, quantised or not supported.
        OSError: not enough disk.
    """
    start = time.perf_counter()
    pruner, allocation, kind = _pruner(method), _allocation(allocation), ValueKind(values)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and less than 1 (0.5 drops half of the weights).")
    source, out = SourceFolder(Path(model_dir)), Path(out_dir).absolute()
    check_out(out)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or _default_dtype(source, device)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point type.")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    skeleton = Skeleton(source, dtype, device)
    stages = _plan(skeleton, include_lm_head, skip)
    left = _left_dense(skeleton)
    windows = _windows(skeleton, pruner, allocation, calibration)
    settings: dict[str, Any] = {
        "method": repr(pruner),
        "sparsity": float(sparsity),
        "allocation": repr(allocation),
        "calibration": None
        if windows is None or calibration is None
        else asdict(calibration) | {"sha256": digest(windows)},
        "dtype": str(dtype).removeprefix("torch."),
        "include_lm_head": include_lm_head,
        "skip": list(skip),
        **({} if kind is ValueKind.BITS16 else {"values": kind.value}),
    }
    job = Job(out, settings | {"model": [str(source.folder.resolve()), *source.identity()], "device": device.type})
    _check_disk(job, source, skeleton, windows)
    with job.started(resume):
        resumed = len(job.records())
        shares = _allocate(job, skeleton, stages, allocation, pruner, float(sparsity), windows, progress)
        stage_seconds = _run(job, skeleton, stages, pruner, shares, kind, windows, progress)
        records = job.records()
        layers = {name: LayerReport(**layer) for record in records for name, layer in record["layers"].items()}
        notes = left + [note for record in records for note in record["warnings"]]
        _complete(
            job, skeleton, stages, settings | {"method": pruner.name, "method_options": repr(pruner)}, layers, notes
        )
        job.deliver()
    sizes = [torch.Size(layer.shape).numel() for layer in layers.values()]
    zeros = sum(layer.zeros for layer in layers.values())
    return PruneReport(
        folder=out,
        method=pruner.name,
        sparsity=float(sparsity),
        layers=layers,
        weights=sum(sizes),
        zeros=zeros,
        warnings=notes,
        resumed_stages=resumed,
        seconds=time.perf_counter() - start,
        stage_seconds=stage_seconds,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def prunable_layers(
    model_dir: str | Path, *, include_lm_head: bool = False, skip: Sequence[str] = ()
) -> dict[str, str]:
    """The layers that :func:`prune_folder` would prune, and the stored names of their weights; it raises the same."""
    skeleton = Skeleton(SourceFolder(Path(model_dir)), torch.float32, torch.device("cpu"))
    return {name: key for stage in _plan(skeleton, include_lm_head, skip) for name, key in stage.layers.items()}


def _pruner(method: str | Pruner) -> Pruner:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ValueError(f"Unknown pruning method {method!r}; known are {', '.join(sorted(METHODS))}.")
    return METHODS[method]()


def _allocation(allocation: str | Allocation) -> Allocation:
    if not isinstance(allocation, str):
        return allocation
    if allocation not in ALLOCATIONS:
        raise ValueError(f"Unknown allocation {allocation!r}; known are {', '.join(sorted(ALLOCATIONS))}.")
    return ALLOCATIONS[allocation]()


def _default_dtype(source: SourceFolder, device: torch.device) -> torch.dtype:
    stored = getattr(source.config.get_text_config(), "dtype", None)
    return stored if device.type != "cpu" and stored in (torch.float16, torch.bfloat16) else torch.float32


def _plan(skeleton: Skeleton, include_lm_head: bool, skip: Sequence[str]) -> list[_Stage]:
    """The stages, with each layer's weight known to be in the source, of the right shape and dtype."""
    try:
        patterns = {text: re.compile(text) for text in skip}
    except re.error as error:
        raise ValueError(f"skip: {error.pattern!r} is no regular expression: {error}.") from error
    stages = [_Stage(name) for name in skeleton.block_names]
    if include_lm_head:
        stages.append(_Stage(skeleton.head_name))
    names = {stage.module: list(skeleton.linears(stage.module)) for stage in stages}
    everything = [name for group in names.values() for name in group]
    if not everything:
        raise ValueError(f"{skeleton.source.folder}: {type(skeleton.model).__name__} has no linear layers to prune.")
    for text, pattern in patterns.items():
        if not any(map(pattern.search, everything)):
            raise ValueError(f"skip: {text!r} is found in no layer's name; names are like {everything[0]!r}.")
    for stage in stages:
        kept = [name for name in names[stage.module] if not any(p.search(name) for p in patterns.values())]
        weights = {name: f"{name}.weight" for name in kept}
        # A weight that blocks share is pruned once, with the block that it is stored for.
        own = [name for name, w in weights.items() if not (skeleton.parts(w) or skeleton.is_shared(w))]
        stage.layers = {name: skeleton.check_weight(name) for name in own}
    if not any(stage.layers for stage in stages):
        raise ValueError(
            f"skip={list(skip)} leaves no layer to prune; those whose weights are stored merged with others or in "
            "parts can't be pruned."
        )
    return stages


def _left_dense(skeleton: Skeleton) -> list[str]:
    """Notes, which are also warnings, if experts or the like hold weights that stay as they are."""
    notes: list[str] = []
    fused = {name: size for block in skeleton.block_names for name, size in skeleton.fused(block).items()}
    if fused:
        notes.append(
            f"{sum(fused.values()):,} weights of merged tensors, experts for example, stay as they are "
            f"({next(iter(fused))} for one): only linear layers are pruned."
        )
    linears = [f"{name}.weight" for block in skeleton.block_names for name in skeleton.linears(block)]
    if converted := {name: parts for name in linears if (parts := skeleton.parts(name))}:
        name, parts = next(iter(converted.items()))
        notes.append(
            f"{len(converted)} linear layers stay as they are: the folder stores them merged with others or in parts "
            f"({name} for one, in {parts[0]})."
        )
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return notes


def _windows(
    skeleton: Skeleton, pruner: Pruner, allocation: Allocation, calibration: CalibrationConfig | None
) -> Tensor | None:
    if pruner.needs == "none" and not allocation.surveys:
        return None
    if calibration is None:
        who = f"Allocation {allocation.name!r}" if pruner.needs == "none" else f"Method {pruner.name!r}"
        raise ValueError(f"{who} needs calibration text; pass calibration=CalibrationConfig(file).")
    config = skeleton.source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and 0 < positions < calibration.seqlen:  # XLNet says -1: no limit
        raise ValueError(
            f"seqlen={calibration.seqlen} is longer than the model's {positions} positions; take a smaller one."
        )
    windows = load_windows(calibration, load_tokenizer(skeleton.source.folder))
    vocabulary = skeleton.embedding_shape[0]
    if (largest := int(windows.max())) >= vocabulary:
        raise CheckpointError(
            f"{skeleton.source.folder}: the tokenizer gives token {largest}, but the model knows {vocabulary} tokens; "
            "the tokenizer belongs to another model."
        )
    return windows


def _check_disk(job: Job, source: SourceFolder, skeleton: Skeleton, windows: Tensor | None) -> None:
    needed = source.nbytes + _SPARE_BYTES
    if windows is not None:
        width = skeleton.embedding_shape[1]
        needed += 2 * windows.numel() * width * skeleton.dtype.itemsize  # one block's, while the next one's are written
    parent = next(path for path in job.folder.parents if path.exists())
    held = sum(file.stat().st_size for file in job.folder.rglob("*") if file.is_file()) if job.folder.exists() else 0
    if (free := shutil.disk_usage(parent).free + held) < needed:
        raise OSError(
            f"Not enough disk under {parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. "
            "Free some, or name another output folder."
        )


def _allocate(
    job: Job,
    skeleton: Skeleton,
    stages: list[_Stage],
    allocation: Allocation,
    pruner: Pruner,
    sparsity: float,
    windows: Tensor | None,
    progress: bool,
) -> dict[str, float]:
    """Each layer's sparsity."""
    blocks = [stage.layers for stage in stages[: len(skeleton.block_names)]]
    surveys: list[Any] = []
    if allocation.surveys and windows is not None and any(blocks):
        with progress_bar(progress) as bar:
            task = bar.add_task(f"surveying ({allocation.name})", total=len(blocks))
            surveys = survey(
                job.survey,
                skeleton,
                blocks,
                allocation,
                pruner,
                sparsity,
                windows,
                lambda done: bar.update(task, completed=done),
            )
    sizes = [{name: torch.Size(skeleton.source.shape(key)).numel() for name, key in block.items()} for block in blocks]
    shares = allocation.spread(surveys, sizes, sparsity) if any(blocks) else {}
    return {name: shares.get(name, sparsity) for stage in stages for name in stage.layers}


def _run(
    job: Job,
    skeleton: Skeleton,
    stages: list[_Stage],
    pruner: Pruner,
    shares: dict[str, float],
    kind: ValueKind,
    windows: Tensor | None,
    progress: bool,
) -> list[float]:
    """Prune all stages that are not finished; the seconds that each took."""
    seconds: list[float] = []
    done = len(job.records())
    if done == len(stages):
        return seconds
    walk = None
    if windows is not None and pruner.needs != "none":
        walk = Walk(skeleton, windows, job.hidden(done) if done else None)
    with progress_bar(progress) as bar:
        task = bar.add_task(f"pruning ({pruner.name})", total=len(stages), completed=done)
        for index in range(done, len(stages)):
            start = time.perf_counter()
            is_last = index == len(stages) - 1
            record = _prune_stage(job, skeleton, stages, index, pruner, shares, kind, walk)
            job.finish(index, record, walk.hidden if walk is not None and not is_last else None)
            bar.advance(task)
            seconds.append(time.perf_counter() - start)
    return seconds


def _prune_stage(
    job: Job,
    skeleton: Skeleton,
    stages: list[_Stage],
    index: int,
    pruner: Pruner,
    shares: dict[str, float],
    kind: ValueKind,
    walk: Walk | None,
) -> dict[str, Any]:
    stage = stages[index]
    scales: dict[str, Tensor] = {}
    if walk is None:
        pruned, scales, record = _prune_layers(skeleton, stage, pruner, shares, kind, None)
    elif index == len(skeleton.block_names):
        head = skeleton.model.get_submodule(stage.module)
        with Collector({stage.module: head}, pruner.needs) as collector:
            walk.observe_head(head)
        pruned, scales, record = _prune_layers(skeleton, stage, pruner, shares, kind, collector.statistics)
    else:
        with skeleton.loaded(stage.module):
            layers = {name: skeleton.model.get_submodule(name) for name in stage.layers}
            if layers:
                with Collector(layers, pruner.needs) as collector:
                    walk.observe(index)
                pruned, scales, record = _prune_layers(skeleton, stage, pruner, shares, kind, collector.statistics)
            else:
                pruned, record = {}, {"layers": {}, "warnings": []}
            if index < len(stages) - 1:
                for name, key in stage.layers.items():
                    skeleton.model.get_parameter(name + ".weight").data.copy_(pruned[key])
                walk.advance(index)
    tensors = {
        key: pruned[key] if key in pruned else skeleton.source.read(key) for key in skeleton.keys_under(stage.module)
    }
    write_tensors(job.model / _shard(index, stages), tensors)
    if scales:
        write_tensors(_scales_of(job, index), scales)
    return record


def _prune_layers(
    skeleton: Skeleton,
    stage: _Stage,
    pruner: Pruner,
    shares: dict[str, float],
    kind: ValueKind,
    statistics: dict[str, Statistics] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Pruned weights and, if they are rounded, scales by their stored names, on the CPU; a record of what was done."""
    pruned: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    notes: list[str] = []
    for name, key in stage.layers.items():
        module = skeleton.model.get_submodule(name)
        weight = matrix(module, read_finite(skeleton, key).to(skeleton.device))
        statistic = None if statistics is None else statistics[name]
        used = pruner
        if statistic is not None and statistic.tokens == 0:
            used = magnitude.Magnitude(per_row=True)
            notes.append(
                f"{name} saw no calibration data and was pruned by magnitude, row by row, not by {pruner.name}."
            )
            warnings.warn(notes[-1], stacklevel=2)
            statistic = None
        elif statistic is not None:
            check_finite(name, statistic, skeleton.dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = used.prune(weight, statistic, shares[name])
            if kind is not ValueKind.BITS16:
                rounded = quantise(weight, found, statistic, kind)
                found, scales[key] = rounded.weight, rounded.scales.cpu()
        for warning in caught:
            notes.append(f"{name}: {warning.message}.")
            warnings.warn(notes[-1], warning.category, stacklevel=2)
        result = matrix(module, found).to("cpu").contiguous()
        zeros = int((result == 0).sum())
        layers[name] = asdict(LayerReport(key, list(result.shape), zeros, zeros / result.numel(), used.name))
        pruned[key] = result
    return pruned, scales, {"layers": layers, "warnings": notes}


def _complete(
    job: Job,
    skeleton: Skeleton,
    stages: list[_Stage],
    settings: dict[str, Any],
    layers: dict[str, LayerReport],
    notes: list[str],
) -> None:
    """Write what is not part of a stage: the other weights, the index, the record, config and tokenizer."""
    source = skeleton.source
    shard_of = {key: _shard(i, stages) for i, stage in enumerate(stages) for key in skeleton.keys_under(stage.module)}
    rest = [key for key in source.names if key not in shard_of]
    if rest:
        write_tensors(job.model / _shard(len(stages), stages), {key: source.read(key) for key in rest})
        shard_of |= dict.fromkeys(rest, _shard(len(stages), stages))
    scales = [load_file(_scales_of(job, i)) for i in range(len(stages)) if _scales_of(job, i).is_file()]
    if scales:
        write_tensors(job.model / SCALES, {key: tensor for found in scales for key, tensor in found.items()})
    total = sum(data_bytes(job.model / shard) for shard in set(shard_of.values()))
    write_json(
        job.model / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))},
    )
    weights = sum(torch.Size(layer.shape).numel() for layer in layers.values())
    zeros = sum(layer.zeros for layer in layers.values())
    record = {"version": RECORD_VERSION, **settings, "weights": weights, "zeros": zeros, "warnings": notes}
    for file in source.side_files():
        shutil.copyfile(file, job.model / file.name)
    write_json(job.model / RECORD, record | {"layers": {name: asdict(layer) for name, layer in layers.items()}})


def _scales_of(job: Job, index: int) -> Path:
    """Where a stage's scales are until all are there."""
    return job.folder / f"scales-{index:05d}.safetensors"


def _shard(index: int, stages: list[_Stage]) -> str:
    return f"model-{index + 1:05d}-of-{len(stages) + 1:05d}.safetensors"
