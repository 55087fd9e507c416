"""Where the Hopper kernel, as compiled for a weight, waits for loads from global memory. Needs no GPU, but nvdisasm
(pip install nvidia-cuda-nvdisasm, or CUDA's own):

    python tests/kernels/waits.py 28672x7168 --sparsity 0.7 --n 64

Instructions wait for loads by one of six scoreboards, and a wait is for all loads on it. A tile's packets are to be
waited for where they are stored to shared memory, before the first products of the next tile. Waits between the loads
and there hold a warp up for as long as memory takes; this prints them, for all tile sizes and numbers of rows of x.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from importlib import metadata
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from devices import DEVICES
from flash_llm.bench.shapes import parse_ns, parse_shapes
from flash_llm.kernels import build, plan
from flash_llm.tensor.layout import LANES, WORD_BITS, ValueKind, ceil_div, grid

NO_SCOREBOARD = 7


class Instruction:
    """One line of nvdisasm -hex, and what its 128 bits say of scoreboards."""

    def __init__(self, text: str, high: int) -> None:
        control = high >> 41
        self.text = " ".join(text.split())
        self.signals = control >> 5 & 7
        self.waits_for = {board for board in range(6) if control >> 11 >> board & 1}

    @property
    def loads_packets(self) -> bool:
        return "LDG" in self.text and ".128." in self.text

    @property
    def multiplies(self) -> bool:
        return "HMMA" in self.text or "GMMA" in self.text


def find_nvdisasm() -> str | None:
    """The program of the installed package, else of the PATH, else None."""
    with suppress(metadata.PackageNotFoundError):
        found = [file for file in metadata.files("nvidia-cuda-nvdisasm") or () if file.name == "nvdisasm"]
        if found:
            return str(found[0].locate())
    return shutil.which("nvdisasm")


def disassembled(binary: bytes, nvdisasm: str) -> list[Instruction]:
    """All instructions of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        text = subprocess.run([nvdisasm, "-hex", "-c", path], capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r"/\*[0-9a-f]+\*/\s+([^;]+);\s+/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/", text)
    return [Instruction(line, int(high, 16)) for line, high in pairs]


def compiled(made: plan.SpmmPlan, nvdisasm: str) -> list[Instruction]:
    """All instructions of a plan's kernel for Hopper."""
    binary, _ = build.compile_cubin(made.source, made.defines, "sm_90a")
    return disassembled(binary, nvdisasm)


def waits(instructions: list[Instruction]) -> list[str]:
    """What waits for the packets' scoreboard, from their first load in the loop over tiles to the last product.

    The one that most of these loads signal: the others' are of packets that are loaded when they are stored, rarely.
    """
    products = [i for i, one in enumerate(instructions) if one.multiplies]
    loads = [i for i in range(products[0], products[-1]) if instructions[i].loads_packets]
    boards = Counter(instructions[i].signals for i in loads if instructions[i].signals != NO_SCOREBOARD)
    if not boards:
        return []
    board = boards.most_common(1)[0][0]
    return [one.text for one in instructions[loads[0] + 1 : products[-1]] if board in one.waits_for]


def chosen(shape: tuple[int, int], sparsity: float, tile_words: int, n: int, values: ValueKind) -> plan.SpmmPlan:
    """The plan for random zeros."""
    strips, _, tiles = grid(*shape, tile_words)
    nonzeros = WORD_BITS * tile_words * (1 - sparsity)
    most = ceil_div(int(nonzeros + 4 * (nonzeros * sparsity) ** 0.5), values.packet_values)
    packets = int(strips * tiles * LANES * (nonzeros / values.packet_values + 0.45))
    return plan.spmm_plan(DEVICES["H100"], *shape, packets, most, tile_words, n, False, values=values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--tile-words", default="4,6,8")
    parser.add_argument("--n", default="8,16,32,64,128")
    parser.add_argument("--values", default="16-bit")
    given = parser.parse_args()
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        parser.error("nvdisasm is neither installed nor on the PATH: pip install nvidia-cuda-nvdisasm")
    found = 0
    tiles = [int(size) for size in given.tile_words.split(",")]
    for shape, tile_words, n in product(parse_shapes(given.shapes), tiles, parse_ns(given.n)):
        made = chosen(shape, given.sparsity, tile_words, n, ValueKind(given.values))
        lines = waits(compiled(made, nvdisasm))
        found += len(lines)
        print(f"{shape[0]}x{shape[1]}, tiles of {tile_words}, {n} rows of x: {'; '.join(lines) or 'none'}", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
