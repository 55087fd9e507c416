"""GPUs as their makers publish them, and as ``flash-llm bench machine`` measures them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

_HOPPER = "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"
_AMPERE = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_AMPERE_GEFORCE = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_BLACKWELL_GEFORCE = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_BLACKWELL = "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet"

_ECC_IN_MEMORY = 0.935  # GDDR6 with error correction on keeps its check bits in the memory itself
_USABLE = 0.99
_PCIE4 = 32e9
_PCIE5 = 64e9


@dataclass(frozen=True)
class Gpu:
    """What a GPU's maker says of it.

    Attributes:
        name: what users call it.
        torch_names: what ``torch.cuda.get_device_name`` may hold.
        capability: compute capability.
        memory: bytes; a published "80 GB" are 80 * 2**30.
        usable: share of it that a program finds, which is *assumed*: the rest goes to error correction and the driver.
        bandwidth: bytes a second.
        matrix_rate: 16-bit floating-point operations a second with float32 sums, without structured sparsity.
        fp8_rate: the same in 8 bits; None: the GPU has none.
        multiprocessors, clock: how many, and their boost clock in Hz.
        link: bytes a second to another GPU, in one direction: half of the published NVLink figure, or PCIe's.
        nvlink: whether that is NVLink.
        source: where it is published.
    """

    name: str
    torch_names: tuple[str, ...]
    capability: tuple[int, int]
    memory: int
    usable: float
    bandwidth: float
    matrix_rate: float
    fp8_rate: float | None
    multiprocessors: int
    clock: float
    link: float
    nvlink: bool
    source: str


def _gpu(
    name: str,
    torch_names: tuple[str, ...],
    capability: tuple[int, int],
    gigabytes: int,
    gigabytes_a_second: float,
    teraflops: float,
    fp8: float | None,
    units: tuple[int, int],
    link: float,
    source: str,
    usable: float = _USABLE,
) -> Gpu:
    """A row of the table, in datasheets' units; ``units``: multiprocessors and their boost clock in MHz."""
    return Gpu(
        name,
        torch_names,
        capability,
        gigabytes << 30,
        usable,
        gigabytes_a_second * 1e9,
        teraflops * 1e12,
        None if fp8 is None else fp8 * 1e12,
        units[0],
        units[1] * 1e6,
        link,
        link > _PCIE5,
        source,
    )


# Rates are without structured sparsity: half of what data sheets mark with an asterisk.
_TABLE = (
    _gpu("a100-40gb", ("A100-SXM4-40GB", "A100-PCIE-40GB"), (8, 0), 40, 1555, 312, None, (108, 1410), 300e9, _AMPERE),
    _gpu("a100-80gb", ("A100-SXM4-80GB",), (8, 0), 80, 2039, 312, None, (108, 1410), 300e9, _AMPERE),
    _gpu("a100-pcie-80gb", ("A100 80GB PCIe",), (8, 0), 80, 1935, 312, None, (108, 1410), _PCIE4, _AMPERE),
    _gpu(
        "a10",
        ("NVIDIA A10",),
        (8, 6),
        24,
        600,
        125,
        None,
        (72, 1695),
        _PCIE4,
        "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf",
        _ECC_IN_MEMORY,
    ),
    _gpu(
        "a6000",
        ("RTX A6000",),
        (8, 6),
        48,
        768,
        154.8,
        None,
        (84, 1800),
        _PCIE4,
        _AMPERE_GEFORCE,
        _ECC_IN_MEMORY,
    ),
    _gpu("rtx-3090", ("RTX 3090",), (8, 6), 24, 936, 71, None, (82, 1695), _PCIE4, _AMPERE_GEFORCE),
    _gpu(
        "l4",
        ("NVIDIA L4",),
        (8, 9),
        24,
        300,
        121,
        242,
        (58, 2040),
        _PCIE4,
        "https://www.nvidia.com/en-us/data-center/l4/",
        _ECC_IN_MEMORY,
    ),
    _gpu(
        "l40s",
        ("L40S",),
        (8, 9),
        48,
        864,
        362,
        733,
        (142, 2520),
        _PCIE4,
        "https://www.nvidia.com/en-us/data-center/l40s/",
        _ECC_IN_MEMORY,
    ),
    _gpu("rtx-4090", ("RTX 4090",), (8, 9), 24, 1008, 165.2, 330.3, (128, 2520), _PCIE4, _ADA),
    _gpu("h100-pcie", ("H100 PCIe",), (9, 0), 80, 2000, 756, 1513, (114, 1755), _PCIE5, _HOPPER),
    _gpu("h100-sxm", ("H100 80GB HBM3",), (9, 0), 80, 3350, 989, 1979, (132, 1980), 450e9, _HOPPER),
    _gpu("h100-nvl", ("H100 NVL",), (9, 0), 94, 3900, 835, 1671, (132, 1785), 300e9, _HOPPER),
    _gpu(
        "h200",
        ("H200",),
        (9, 0),
        141,
        4800,
        989,
        1979,
        (132, 1980),
        450e9,
        "https://www.nvidia.com/en-us/data-center/h200/",
    ),
    _gpu("b200", ("B200",), (10, 0), 180, 7700, 2250, 4500, (148, 1965), 900e9, _BLACKWELL),
    _gpu("rtx-5090", ("RTX 5090",), (12, 0), 32, 1792, 209.5, 419, (170, 2407), _PCIE5, _BLACKWELL_GEFORCE),
)

GPUS = {gpu.name: gpu for gpu in _TABLE}
ALIASES = {"a100": "a100-80gb", "h100": "h100-sxm", "rtx4090": "rtx-4090", "rtx5090": "rtx-5090"}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name from GPUS or ALIASES, or of a name that torch gives it.

    Raises:
        ValueError: there is none.
    """
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if found := GPUS.get(ALIASES.get(key, key)):
        return found
    for gpu in sorted(_TABLE, key=lambda gpu: -max(map(len, gpu.torch_names))):
        if any(name.strip() == part or name.strip().endswith(f" {part}") for part in gpu.torch_names):
            return gpu
    raise ValueError(
        f"GPU {name!r} is not in the table: take one of {', '.join(GPUS)}; or measure yours with "
        f"`flash-llm bench machine` and give the file with --machine"
    )


@dataclass(frozen=True)
class Machine:
    """A GPU as ``flash-llm bench machine`` measured it.

    Attributes:
        gpu: torch's name of it.
        capability: compute capability, "9.0".
        memory: bytes that a program finds.
        read_bandwidth: bytes a second.
        matrix_rate: 16-bit floating-point operations a second.
        launch_us: microseconds from one tiny kernel to the next in a CUDA graph.
        multiprocessors, clock: how many, and their highest clock in Hz.
    """

    gpu: str
    capability: str
    memory: int
    read_bandwidth: float
    matrix_rate: float
    launch_us: float
    multiprocessors: int
    clock: float

    def published(self) -> Gpu:
        """The table's row of this GPU; for one that isn't there, a row of what was measured, linked by PCIe 4."""
        try:
            return find_gpu(self.gpu)
        except ValueError:
            major, minor = map(int, self.capability.split("."))
        return Gpu(
            name=self.gpu,
            torch_names=(self.gpu,),
            capability=(major, minor),
            memory=self.memory,
            usable=1.0,
            bandwidth=self.read_bandwidth,
            matrix_rate=self.matrix_rate,
            fp8_rate=None,
            multiprocessors=self.multiprocessors,
            clock=self.clock,
            link=_PCIE4,
            nvlink=False,
            source="",
        )


def machine_file() -> Path:
    """Where ``flash-llm bench machine`` leaves its figures: flash-llm/machine.json in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flash-llm" / "machine.json"


def read_machine(path: Path) -> Machine:
    """The machine that a file of ``flash-llm bench machine`` describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file.
    """
    hint = "give a file that `flash-llm bench machine` wrote"
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}): {hint}") from None
    names = [field.name for field in fields(Machine)]
    lacking = [name for name in names if not isinstance(value, dict) or name not in value]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: {hint}")
    if not re.fullmatch(r"\d+\.\d+", str(value["capability"])) or not isinstance(value["gpu"], str):
        raise ValueError(f"{path} names no GPU and its compute capability, such as '9.0': {hint}")
    for name in names[2:]:
        number = value[name]
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < float("inf"):
            raise ValueError(f"{path} has {name} = {number!r}, which must be a number above 0: {hint}")
    return Machine(**{name: value[name] for name in names})
