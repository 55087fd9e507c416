"""Time and memory of pruning a block, by method: of a real model, or of one with random weights in a known shape.

    python examples/pruning_cost.py MODEL --calibration text.txt.gz --out cost.json [--blocks 3]
    python examples/pruning_cost.py --random opt-13b --tokenizer MODEL --calibration text.txt.gz --blocks 3
    python examples/pruning_cost.py --extrapolate cost.json --to opt-66b,opt-175b

A folder with the first ``--blocks`` blocks is made (time and memory of a block don't depend on how many there are), its
files are dropped from the system's cache, and it is pruned from disk to disk. "walk" is all but the solver: reading,
the two passes of the calibration data, the Hessians, writing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flash_llm.capacity.models import BUILT_IN
from flash_llm.environment import environment
from flash_llm.files import write_json
from flash_llm.prune import METHODS, CalibrationConfig, Pruner, prune_folder
from flash_llm.prune.skeleton import block_names


@dataclass(frozen=True)
class Timed:
    """A method, and the seconds that it takes for each layer, without what was asked of the GPU before."""

    method: Pruner
    device: str
    seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def needs(self) -> Any:
        return self.method.needs

    def prune(self, weight: Tensor, statistics: Any, sparsity: float) -> Tensor:
        self._wait()
        start = time.perf_counter()
        pruned = self.method.prune(weight, statistics, sparsity)
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        return pruned

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def main() -> None:
    options = _options()
    if options.extrapolate:
        print(extrapolation(json.loads(options.extrapolate.read_text(encoding="utf-8")), options.to))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        model = Path(scratch, "model")
        blocks, total = make_random(model, options) if options.random else first_blocks(model, options)
        result: dict[str, Any] = {
            "settings": {
                "model": options.random or options.model.name,
                "calibration": f"{Path(options.calibration).name}, {options.samples} x {options.seqlen}, seed 0",
                "sparsity": options.sparsity,
                "blocks": blocks,
                "blocks_of_the_model": total,
                "device": options.device,
                "dtype": options.dtype or "auto",
                "threads": torch.get_num_threads(),
            },
            "machine": environment(),
            "methods": {},
        }
        for name in options.methods:
            result["methods"][name] = cost(model, name, options)
            write_json(options.out, result)
            print(name, json.dumps(result["methods"][name]), flush=True)


def cost(model: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prune the folder with a method, and throw the result away."""
    drop_from_cache(model)
    method, out = Timed(METHODS[name](), options.device), model.with_name("pruned")
    calibration = CalibrationConfig(options.calibration, options.samples, options.seqlen)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    report = prune_folder(
        model, out, method, options.sparsity, calibration=calibration, device=options.device, dtype=dtype
    )
    shutil.rmtree(out)
    layers = len(method.seconds) // len(report.stage_seconds)
    solving = [sum(method.seconds[i : i + layers]) for i in range(0, len(method.seconds), layers)]
    return {
        "block_seconds": report.stage_seconds,
        "solver_seconds": solving,
        "other_seconds": report.seconds - sum(report.stage_seconds),
        "layer_seconds": dict(zip(report.layers, method.seconds, strict=True)),
        "peak_gpu_bytes": report.peak_bytes,
        "peak_process_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def make_random(folder: Path, options: argparse.Namespace) -> tuple[int, int]:
    """A folder with random weights, float16, and the tokenizer of another; how many blocks it has, and should have."""
    shape = dict(BUILT_IN[options.random])
    total = shape.pop("num_hidden_layers")
    config = AutoConfig.for_model(**shape, num_hidden_layers=options.blocks or total)
    config.dtype = torch.float16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    for file in options.tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    names: dict[str, str] = {}
    prefixes = [name + "." for name in block_names(model)]
    parameters = dict(model.named_parameters())  # a tied head is not among them
    for index, prefix in enumerate([*prefixes, ""]):
        shard, tensors = f"model-{index:05d}.safetensors", {}
        for name in [name for name in parameters if name.startswith(prefix) and name not in names]:
            shape_of = parameters[name].shape
            value = torch.zeros(shape_of) if name.endswith("bias") else torch.ones(shape_of)
            if len(shape_of) > 1:
                value = torch.empty(shape_of, device=device).normal_(0, 0.02, generator=generator)
            tensors[name], names[name] = value.half().cpu(), shard
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    return len(prefixes), total


def first_blocks(folder: Path, options: argparse.Namespace) -> tuple[int, int]:
    """A copy of a model's folder with its first blocks; how many it has, and had."""
    shutil.copytree(options.model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    total = config["num_hidden_layers"]
    blocks = min(options.blocks or total, total)
    write_json(folder / "config.json", config | {"num_hidden_layers": blocks})
    if blocks < total:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        kept = model.state_dict().keys()
        for shard in folder.glob("*.safetensors"):
            save_file({n: t for n, t in load_file(shard).items() if n in kept}, shard, metadata={"format": "pt"})
    return blocks, total


def drop_from_cache(folder: Path) -> None:
    """Make the next one who reads a folder's files read them from disk."""
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def extrapolation(result: dict[str, Any], names: list[str]) -> str:
    """What other models of the same family would take, as Markdown, with the arithmetic."""
    base = BUILT_IN[result["settings"]["model"]]
    width, lines = base["hidden_size"], []
    for method, found in result["methods"].items():
        # The first block also waits for what is made ready once, and the last hands nothing on.
        pairs = list(zip(found["block_seconds"], found["solver_seconds"], strict=True))[1:-1]
        solver = sum(solving for _, solving in pairs) / len(pairs)
        walk = sum(seconds for seconds, _ in pairs) / len(pairs) - solver
        lines.append(
            f"| {result['settings']['model']}, {method} | {walk:.1f} + {solver:.1f} = {walk + solver:.1f} s | "
            f"{(walk + solver) * base['num_hidden_layers'] / 60:.0f} min | "
            f"{memory(base, method) / 1e9:.1f} GB; measured {found['peak_gpu_bytes'] / 1e9:.1f} GB |"
        )
        for name in names:
            other = BUILT_IN[name]
            r = other["hidden_size"] / width
            each = walk * r**2 + solver * r**3
            lines.append(
                f"| {name}, {method} | {walk:.1f} x {r**2:.2f} + {solver:.1f} x {r**3:.2f} = {each:.0f} s | "
                f"{each * other['num_hidden_layers'] / 3600:.1f} h | {memory(other, method) / 1e9:.0f} GB |"
            )
    head = "| model, method | a block: walk + solver | all blocks | GPU memory |\n|---|---|---|---|\n"
    return head + "\n".join(lines)


def memory(shape: dict[str, Any], method: str) -> float:
    """Bytes on the GPU at the largest layer, on one of 80 GB: see docs/pruning.md."""
    outputs, inputs = shape["hidden_size"], shape["ffn_dim"]
    copies = {"sparsegpt": 4, "alps": 10}[method]
    block, hidden = 2.0 * 12 * outputs**2, 2.0 * 128 * 2048 * outputs
    return 4.0 * (4 * inputs**2 + copies * outputs * inputs) + block + (hidden if hidden < 5e9 else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--random", choices=sorted(BUILT_IN), help="random weights in this model's shape")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer a random model gets")
    parser.add_argument("--calibration", help="text that the methods look at")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--methods", type=_words, default=["wanda", "sparsegpt", "alps"])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--blocks", type=int, help="prune so many; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="to walk in")
    parser.add_argument("--scratch", type=Path, help="folder for the models")
    parser.add_argument("--out", type=Path, default=Path("pruning-cost.json"))
    parser.add_argument("--extrapolate", type=Path, metavar="JSON", help="only print what other models would take")
    parser.add_argument("--to", type=_words, default=["opt-66b", "opt-175b"])
    options = parser.parse_args()
    if not options.extrapolate and not (
        (options.model or (options.random and options.tokenizer)) and options.calibration
    ):
        parser.error(
            "MODEL or --random NAME --tokenizer FOLDER, and --calibration are needed; --extrapolate JSON to show"
        )
    return options


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


if __name__ == "__main__":
    main()
