"""Plans that ``flash-llm tune`` found quicker on this very GPU than those that ``plan.py`` expects to be quick.

A table says for a weight's shape and tile size, of either dtype, and for the rows of x that are multiplied at a time,
how many warps a block has and how many blocks share a multiprocessor. There is one file a GPU model and kernel source
in the cache folder: other kernels, or another way of planning, and what was found before no longer counts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from flash_llm.errors import KernelError
from flash_llm.files import write_json
from flash_llm.kernels import build, plan
from flash_llm.tensor.layout import ceil_div

Place = tuple[int, int, int, int, int]
"""(rows, columns, tile_words, N_BLOCKS, passes): what of a weight and x decides between plans; see :func:`place_of`"""
Choice = tuple[int, int]
"""(warps, resident), as ``plan.spmm_plan`` takes them"""
Weight = tuple[int, int, int, int, int]
"""(rows, columns, packets, max_packets, tile_words)"""
Table = Mapping[Place, Choice]
Row = dict[str, Any]

CHOICES: tuple[Choice, ...] = ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (12, 1), (16, 1))
PLACE = ("rows", "columns", "tile_words", "n_blocks", "passes")
_CHOICE = ("warps", "resident")
_NARROW = 8  # blocks of x up to which registers are never short
_OTHER_REGISTERS = 40  # than those for sums, without which the compiler refuses wide products


def spmm_plan(table: Table, device: plan.Device, weight: Weight, n: int, bf16: bool) -> plan.SpmmPlan:
    """``plan.spmm_plan`` of a device, a weight and x [n, columns], with the table's choice if it has one that fits."""
    usual = plan.spmm_plan(device, *weight, n, bf16)
    choice = table.get(place_of(weight, n, usual))
    return usual if choice is None else candidates(device, weight, n, bf16).get(choice, usual)


def candidates(device: plan.Device, weight: Weight, n: int, bf16: bool) -> dict[Choice, plan.SpmmPlan]:
    """The usual plan first, and those of CHOICES whose blocks fit into shared memory together."""
    usual = plan.spmm_plan(device, *weight, n, bf16)
    n_blocks = blocks_of_x(usual)
    found = {choice_of(usual): usual}
    for warps, resident in CHOICES:
        made = plan.spmm_plan(device, *weight, n, bf16, n_blocks=n_blocks, warps=warps, resident=resident)
        if (warps, resident) not in found and _fits(device, made, resident):
            found[warps, resident] = made
    return found


def place_of(weight: Weight, n: int, usual: plan.SpmmPlan) -> Place:
    """Where a table has the choice for x [n, columns]: the same for all n that the usual plan treats alike."""
    rows, columns, _, _, tile_words = weight
    return rows, columns, tile_words, blocks_of_x(usual), ceil_div(n, 8 * blocks_of_x(usual))


def blocks_of_x(chosen: plan.SpmmPlan) -> int:
    """N_BLOCKS: rows of x that are multiplied in one pass over the weight, over 8."""
    return dict(chosen.defines)["N_BLOCKS"]


def choice_of(chosen: plan.SpmmPlan) -> Choice:
    """What a plan chose."""
    defines = dict(chosen.defines)
    return defines["WARPS"], defines.get("RESIDENT", 1)


def _fits(device: plan.Device, made: plan.SpmmPlan, resident: int) -> bool:
    """Whether ``resident`` blocks have room in shared memory, and each thread registers for its sums of wide x."""
    if not plan.fit_together(device, made.shared, resident):
        return False
    if blocks_of_x(made) <= _NARROW:
        return True
    # Of wide x the ring has what the columns leave. (Narrow ones of two pieces were found quickest for some tiles.)
    stages = dict(made.defines).get("STAGES", plan._LEAST_STAGES)
    registers = min(255, plan._REGISTERS // (made.threads * resident)) // 8 * 8
    return stages >= plan._LEAST_STAGES and registers >= 4 * blocks_of_x(made) + _OTHER_REGISTERS


def path(device: int) -> Path:
    """The file of a CUDA device's model, be it there or not."""
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return build.cache_dir() / f"tuned-{gpu}-{_digest()}.json"


@functools.cache
def table(device: int, kernel: str) -> Table:
    """What was found for one of ``choice.KERNELS`` on a CUDA device; nothing, if it was not tuned. Read once.

    Raises:
        KernelError: the file is damaged.
    """
    return {
        tuple(row[name] for name in PLACE): (row["warps"], row["resident"])  # type: ignore[misc]
        for row in read(path(device))
        if row["kernel"] == kernel
    }


def read(file: Path) -> list[Row]:
    """The rows of a file, none if there is no file: ``kernel``, a Place, a Choice, and what was measured.

    Raises:
        KernelError: the file is damaged.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["plans"]
        for row in rows:
            numbers = [row[name] for name in (*PLACE, *_CHOICE)]
            if any(type(number) is not int or number < 1 for number in numbers) or type(row["kernel"]) is not str:
                raise ValueError(f"a plan is {row}")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KernelError(
            f"{file}, where `flash-llm tune` keeps its plans, can't be read ({type(error).__name__}: {error}): remove "
            f"it, and tune again"
        ) from error
    return rows


def keep(rows: Iterable[Row], device: int) -> Path:
    """Adds rows to a CUDA device's file, in place of older ones, and takes them from now on. Returns the file's path.

    Raises:
        KernelError: the file is damaged, or can't be written.
    """
    file = path(device)
    merged = {(row["kernel"], *(row[name] for name in PLACE)): row for row in [*read(file), *rows]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"gpu": torch.cuda.get_device_name(device), "plans": list(merged.values())})
    except OSError as error:
        raise KernelError(
            f"plans can't be kept in {file.parent}: {error}. Set FLASH_LLM_CACHE_DIR to a folder that can be written to"
        ) from error
    table.cache_clear()
    return file


@functools.cache
def _digest() -> str:
    """Of what plans depend on: the kernels' sources, how plans are made, and what a file says."""
    digest = hashlib.sha256()
    for file in [*sorted(build.source_dir().glob("*.cu*")), Path(plan.__file__), Path(__file__)]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]
