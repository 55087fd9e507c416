"""What fits on which GPUs, and how fast it would be: every format side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from flash_llm.capacity.efficiency import Efficiency, efficiency
from flash_llm.capacity.models import Linear, ModelShape
from flash_llm.capacity.roofline import Rates, Roofline, shard
from flash_llm.capacity.sizes import Format
from flash_llm.kernels.plan import rows_unpacked

BATCHES = (1, 8, 16, 32, 64, 128, 256)
MAX_GPUS = 8

RESERVED = int(1.8 * 2**30)
"""Bytes of a GPU that neither weights nor the KV cache may have: activations, graphs, libraries. vLLM's mean over four
models on H100s was 1.8 GiB."""

_BYTES = 2


@dataclass(frozen=True)
class Workload:
    """What is asked of a model.

    Attributes:
        input_len, output_len: tokens of a prompt, and of its answer.
        batches: sequences at a time that speeds are told for.
        gpus: that share each layer; None: as few as hold the model.
        max_gpus: not more.
        memory_share: of a GPU's memory that may be used.

    Raises:
        ValueError: a number out of range.
    """

    input_len: int = 512
    output_len: int = 256
    batches: tuple[int, ...] = BATCHES
    gpus: int | None = None
    max_gpus: int = MAX_GPUS
    memory_share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "max_gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} {getattr(self, name)}: it must be at least 1")
        if self.gpus is not None and self.gpus < 1:
            raise ValueError(f"gpus {self.gpus}: it must be at least 1")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches {list(self.batches)}: give at least one, each of at least 1")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory share {self.memory_share}: it must be above 0 and at most 1")


@dataclass(frozen=True)
class Speed:
    """Of one batch size: seconds of a step, and tokens made a second, prefill included, in all and a GPU."""

    batch: int
    prefill_ms: float
    step_ms: float
    tokens_per_second: float
    tokens_per_gpu_second: float


@dataclass(frozen=True)
class Row:
    """One format.

    Attributes:
        format: its name.
        sparsity: share of zeros; None where there are none.
        weights_bytes: of the whole model.
        of_dense: the same over the dense model's.
        gpus: how many hold it; None: it doesn't fit, and ``why`` says so.
        weights_bytes_a_gpu: on each of them.
        cache_bytes_a_token: of the KV cache, on each of them.
        cache_tokens: that the KV cache has room for.
        largest_batch: sequences of the full length that fit at once.
        speeds: for each batch that fits, and for the largest.
        why: why there is nothing to say.
    """

    format: str
    sparsity: float | None
    weights_bytes: int
    of_dense: float
    gpus: int | None = None
    weights_bytes_a_gpu: int | None = None
    cache_bytes_a_token: float | None = None
    cache_tokens: int | None = None
    largest_batch: int | None = None
    speeds: tuple[Speed, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """What :func:`make_plan` found, and of what.

    Attributes:
        model, parameters: its name and size.
        stay_dense: linear layers that no format but the dense one can hold, since they are of a class of their own.
        rates: of each GPU.
        workload: what was asked.
        rows: one a format.
        basis: what the efficiencies rest on.
    """

    model: str
    parameters: int
    stay_dense: int
    rates: Rates
    workload: Workload
    rows: tuple[Row, ...]
    basis: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def make_plan(
    model: ModelShape, rates: Rates, forms: list[Format], workload: Workload, known: Efficiency | None = None
) -> Plan:
    """Compares formats of a model on a GPU.

    Args:
        model: from :func:`flash_llm.capacity.models.load_model`.
        rates: from :func:`flash_llm.capacity.roofline.rates`.
        forms: from :func:`flash_llm.capacity.sizes.formats`.
        known: efficiencies; None: those that come with the package.

    Raises:
        ValueError: sequences longer than the model takes, or a number of GPUs that doesn't divide its heads or layers.
    """
    known = known or efficiency()
    length = workload.input_len + workload.output_len
    if model.longest is not None and length > model.longest:
        raise ValueError(
            f"{workload.input_len} tokens in and {workload.output_len} out are {length}, and {model.name} takes "
            f"{model.longest} at most: ask for fewer"
        )
    allowed = allowed_gpus(model, max(workload.max_gpus, workload.gpus or 1))
    if workload.gpus is not None and workload.gpus not in allowed:
        raise ValueError(
            f"{workload.gpus} GPUs can't share {model.name}'s {model.heads} heads and its layers equally: take one "
            f"of {', '.join(map(str, allowed))}"
        )
    rows = tuple(_row(model, rates, form, workload, allowed, known) for form in forms)
    stay_dense = sum(linear.count * len(linear.rows) for linear in model.linears if not linear.packable)
    return Plan(model.name, model.parameters, stay_dense, rates, workload, rows, known.basis)


def allowed_gpus(model: ModelShape, most: int) -> list[int]:
    """Numbers of GPUs that divide the query heads and all layers, and divide the key and value heads or repeat them."""
    key_heads = {cache.heads for cache in model.caches}
    return [
        gpus
        for gpus in range(1, most + 1)
        if model.heads % gpus == 0
        and all(heads % gpus == 0 or gpus % heads == 0 for heads in key_heads)
        and all(_cut_side(linear) % gpus == 0 for linear in model.linears)
    ]


def _cut_side(linear: Linear) -> int:
    """What :func:`shard` divides; of a query, key and value projection the query, as keys may be repeated."""
    return max(linear.rows) if sum(linear.rows) >= linear.columns else linear.columns


def weights_bytes(model: ModelShape, form: Format, gpus: int = 1) -> int:
    """Bytes of all weights on each of ``gpus``: embeddings and the output layer are cut too, norms and biases not."""
    linears = 0
    for linear in model.linears:
        stored = form if linear.packable else Format("dense")
        rows, columns = shard(linear, gpus)
        linears += linear.count * sum(stored.nbytes(part, columns) for part in rows)
    return linears + _BYTES * (model.other + -(-model.embedding // gpus))


def _row(
    model: ModelShape, rates: Rates, form: Format, workload: Workload, allowed: list[int], known: Efficiency
) -> Row:
    total, dense = (weights_bytes(model, which) for which in (form, Format("dense")))
    row = Row(form.name, form.sparsity if form.kind == "sparse" else None, total, total / dense)
    if form.kind == "fp8" and rates.fp8 is None:
        return replace(row, why="this GPU has no units for 8-bit floating-point numbers")
    length = workload.input_len + workload.output_len
    for gpus in [workload.gpus] if workload.gpus else allowed:
        free = cache_room(model, rates, form, gpus, workload.memory_share)
        sequence = _BYTES * sum(cache.elements(length, gpus) for cache in model.caches)
        batch = int(free // sequence)
        if batch < 1:
            continue
        line = Roofline(model, rates, gpus, known)
        batches = sorted({size for size in workload.batches if size <= batch} | {batch})
        return replace(
            row,
            gpus=gpus,
            weights_bytes_a_gpu=weights_bytes(model, form, gpus),
            cache_bytes_a_token=sequence / length,
            cache_tokens=int(free / sequence * length),
            largest_batch=batch,
            speeds=tuple(speed(line, form, size, workload) for size in batches),
        )
    most = workload.gpus or allowed[-1]
    return replace(row, why=f"it and one sequence don't fit on {most} of these GPU{'s' if most > 1 else ''}")


def cache_room(model: ModelShape, rates: Rates, form: Format, gpus: int, memory_share: float) -> float:
    """Bytes of each GPU that are left for the KV cache; negative if the weights alone don't fit."""
    taken = weights_bytes(model, form, gpus) + RESERVED
    if form.kind == "sparse":  # long prompts are multiplied from what is unpacked of a layer into a workspace
        shares = [shard(linear, gpus) for linear in model.linears if linear.packable]
        at_a_time = (min(sum(rows), rows_unpacked(sum(rows), columns)) * columns for rows, columns in shares)
        taken += _BYTES * max(at_a_time, default=0)
    return rates.memory * memory_share - taken


def speed(line: Roofline, form: Format, batch: int, workload: Workload) -> Speed:
    """The speed of a batch that starts together: its prefill, then a step for each token after the first."""
    prefill = line.prefill_us(form, batch, workload.input_len)
    step = line.step_us(form, batch, workload.input_len + workload.output_len / 2)
    tokens = batch * workload.output_len / (prefill + (workload.output_len - 1) * step) * 1e6
    return Speed(batch, prefill * 1e-3, step * 1e-3, tokens, tokens / line.gpus)
