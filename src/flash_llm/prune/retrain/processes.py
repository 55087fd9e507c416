"""Several processes that train one model, each on a GPU: what torch's FSDP shares out, and what they tell each other.

``fully_shard`` keeps a part of each weight, of its gradient and of its moments on each GPU, and collects a block's
weights while it is at work. All else here works on a process's own part: masks and scores element by element, and
thresholds by counting, which needs sums of single numbers.
"""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flash_llm.prune.skeleton import block_names


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory: all of it, unless it is shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. If it is shared out, all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(part: Tensor, weight: Tensor) -> Tensor:
    """A process's own part of a tensor that is shared out as ``weight`` is."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.size(), stride=weight.stride()
    )


class Processes:
    """The processes of a run. One alone says nothing to anybody.

    Args:
        size: how many there are.
        rank: which of them this is.
        mesh: of the devices; None with one process.
    """

    def __init__(self, size: int = 1, rank: int = 0, mesh: DeviceMesh | None = None) -> None:
        self.size, self.rank, self._mesh = size, rank, mesh

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.rank == 0

    def share_out(self, model: nn.Module) -> None:
        """Share a model out, block by block, in place: from where it is to the devices of the mesh."""
        if self._mesh is None:
            return
        for name in block_names(model):
            fully_shard(model.get_submodule(name), mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)

    def sum(self, number: int) -> int:
        """The sum of a number over all processes."""
        return sum(self._gathered(number))

    def before(self, number: int) -> int:
        """The sum of a number over the processes before this one."""
        return sum(self._gathered(number)[: self.rank])

    def any(self, is_so: bool) -> bool:
        """Whether it is so in any process."""
        return self.sum(int(is_so)) > 0

    def as_first(self, number: int) -> int:
        """The first process's number."""
        return self._gathered(number)[0]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, element by element."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum(0)

    def _gathered(self, number: int) -> list[int]:
        if self.size == 1:
            return [number]
        parts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(parts, torch.tensor([int(number)]))  # of tensors on the CPU: no GPU has to wait
        return [int(part) for part in parts]


ALONE = Processes()


def is_first() -> bool:
    """Whether this process is the one to talk to the user, of those that ``torchrun`` has started or alone."""
    return os.environ.get("RANK", "0") == "0"


def started(device: torch.device) -> tuple[Processes, torch.device]:
    """The processes that ``torchrun`` has started, and this one's device; ALONE without it.

    Raises:
        ValueError: a GPU is named, though each process has its own.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, device
    if device.index is not None:
        raise ValueError(
            f"device={device} with {size} processes: each takes a GPU of its own; say cuda, or leave it out."
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(size, dist.get_rank(), init_device_mesh(device.type, (size,))), device
