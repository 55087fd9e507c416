"""The pass over the dense model that an allocation learns from: block by block, restartable like the pruning itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from flash_llm.layers import matrix
from flash_llm.prune.allocate import Allocation, Block
from flash_llm.prune.job import Stages
from flash_llm.prune.method import Pruner
from flash_llm.prune.skeleton import Skeleton
from flash_llm.prune.statistics import Collector, Statistics
from flash_llm.prune.walk import Walk


def survey(
    job: Stages,
    skeleton: Skeleton,
    layers: Sequence[Mapping[str, str]],
    allocation: Allocation,
    pruner: Pruner,
    sparsity: float,
    windows: Tensor,
    advanced: Callable[[int], None],
) -> list[Any]:
    """Survey all blocks that are not yet surveyed.

    Args:
        job: what is finished.
        skeleton: the model.
        layers: of each block, the layers to prune and the stored names of their weights.
        allocation: what is to be known.
        pruner: the job's method.
        sparsity: that is wanted.
        windows: calibration data.
        advanced: is called with the number of finished blocks.

    Returns:
        The allocation's records of all blocks.

    Raises:
        ValueError: NaN or infinite weights or activations.
    """
    done = len(job.records())
    advanced(done)
    if done < len(layers):
        walk = Walk(skeleton, windows, job.hidden(done) if done else None)
        for index in range(done, len(layers)):
            with skeleton.loaded(skeleton.block_names[index]):
                record = _survey_block(skeleton, layers[index], index, allocation, pruner, sparsity, walk)
                is_last = index == len(layers) - 1
                if not is_last:
                    walk.advance(index)
            job.finish(index, record, None if is_last else walk.hidden)
            advanced(index + 1)
    return job.records()


def _survey_block(
    skeleton: Skeleton,
    layers: Mapping[str, str],
    index: int,
    allocation: Allocation,
    pruner: Pruner,
    sparsity: float,
    walk: Walk,
) -> Any:
    modules = {name: skeleton.model.get_submodule(name) for name in layers}
    statistics: dict[str, Statistics | None] = dict.fromkeys(layers)
    if layers and (need := allocation.needs(pruner)) != "none":
        with Collector(modules, need) as collector:
            walk.observe(index)
        statistics |= collector.statistics
    weights = {
        name: matrix(modules[name], read_finite(skeleton, key).to(skeleton.device)) for name, key in layers.items()
    }
    for name, statistic in statistics.items():
        if statistic is not None:
            check_finite(name, statistic, skeleton.dtype)

    def replace(name: str, weight: Tensor) -> None:
        # Not copied into what is there, which may be the mapped file, as `weights` are.
        parameter = modules[name].get_parameter("weight")
        parameter.data = matrix(modules[name], weight).to(parameter.dtype)

    return allocation.survey(
        Block(weights, statistics, replace, lambda n: islice(walk.outputs(index), n)), pruner, sparsity
    )


def read_finite(skeleton: Skeleton, key: str) -> Tensor:
    """A weight of the source, on the CPU, as it is stored.

    Raises:
        ValueError: it has NaN or infinite values.
    """
    weight = skeleton.source.read(key)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"Weight {key} of {skeleton.source.folder} has NaN or infinite values; it can't be pruned.")
    return weight


def check_finite(name: str, statistic: Statistics, dtype: torch.dtype) -> None:
    """Raises:
    ValueError: the layer's inputs were not all finite.
    """
    if not statistic.is_finite():
        raise ValueError(
            f"The inputs of {name} overflow or are NaN in {dtype}; "
            "run with dtype=torch.bfloat16 or torch.float32 (the weights keep their own dtype)."
        )
