"""Retraining compared at equal cost: what each way makes of a dense model in the same number of tokens.

    python examples/retrain_table.py MODEL --text text.txt.gz --test wikitext2-test.txt.gz --work WORK
    python examples/retrain_table.py --draw retrain.json --image loss.png
    python examples/retrain_table.py --print retrain.json

A case that the JSON has already is not run again, and one that was cut off goes on. Cases run one after the other, so
that their seconds are those of a GPU of their own; the first also compiles, and its seconds hold that.

One-shot models, from which most cases start, are made by ALPS (128 x 2048 tokens of --calibration) in WORK; a folder of
``pruning_table.py --keep`` has them under the same names. MODEL, which is also the teacher, may itself be the result of
the case "dense": then all that follows starts from a model that has been trained on the text already.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from flash_llm.compare import load_folder
from flash_llm.environment import environment
from flash_llm.evaluate import load_text, perplexity
from flash_llm.files import write_json
from flash_llm.prune import CalibrationConfig, prune_folder
from flash_llm.prune.retrain import RetrainConfig, retrain

# Where a case starts: the dense model, or ALPS' at so many zeros. And its settings, besides those that all have.
CASES: dict[str, tuple[float | None, dict[str, Any]]] = {
    "dense": (None, {"dense": True}),
    "hold-50": (0.5, {}),
    "hold-60": (0.6, {}),
    "hold-70": (0.7, {}),
    "hold-80": (0.8, {}),
    "gradual-70": (0.5, {"sparsity": 0.7}),
    "gradual-80": (0.5, {"sparsity": 0.8}),
    "taylor-50": (None, {"sparsity": 0.5, "score": "taylor"}),
    "taylor-70": (0.5, {"sparsity": 0.7, "score": "taylor"}),
    "taylor-80": (0.5, {"sparsity": 0.8, "score": "taylor"}),
    "global-50": (None, {"sparsity": 0.5, "score": "taylor", "scope": "global"}),
    "global-70": (None, {"sparsity": 0.7, "score": "taylor", "scope": "global"}),
    "global-80": (None, {"sparsity": 0.8, "score": "taylor", "scope": "global"}),
    "admm-80": (None, {"sparsity": 0.8, "schedule": "admm", "score": "taylor"}),
    "ce-70": (0.7, {"distill": 0.0}),
    "lora-70": (0.7, {"lora_rank": 16}),
}


def main() -> None:
    options = _options()
    if options.draw:
        draw(json.loads(options.draw.read_text(encoding="utf-8")), options.image)
    elif options.print:
        print(markdown(json.loads(options.print.read_text(encoding="utf-8"))))
    else:
        disable_progress_bar()
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Run the cases that are missing."""
    end = time.monotonic() + options.minutes * 60
    common = {"test": options.test.name, "window": 2048, "model": options.model.name}
    result: dict[str, Any] = {"settings": common, "machine": environment(), "cases": []}
    if options.out.exists():
        result = json.loads(options.out.read_text(encoding="utf-8"))
    for name in options.cases:
        if any(case["name"] == name + options.suffix for case in result["cases"]) or time.monotonic() > end:
            continue
        result["cases"].append(run(name, options))
        write_json(options.out, result)
        print(json.dumps({k: v for k, v in result["cases"][-1].items() if k != "curve"}), flush=True)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case: what it was, what it cost, and the perplexity."""
    start, settings = CASES[name]
    settings = {"steps": options.steps, "seqlen": 2048, "batch": 8, "compile": True} | settings | options.set
    folder = options.model if start is None else one_shot(start, options)
    out = options.work / (name + options.suffix)
    config = RetrainConfig(options.text, **settings)
    begin = time.perf_counter()
    report = retrain(
        folder, out, config, teacher=options.model if config.distill else None, device=options.device, progress=False
    )
    wall = time.perf_counter() - begin
    curve = json.loads((out / "retraining.json").read_text(encoding="utf-8"))
    return {
        "name": out.name,
        "start": "dense" if start is None else f"alps, {options.allocation}, {start:.0%}",
        "text": Path(options.text).name,
        "settings": settings,
        "steps": report.steps,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "wall_seconds": wall,
        "peak_bytes": report.peak_bytes,
        "zeros": report.zeros / report.weights if report.weights else 0.0,
        "perplexity": measured(out, options),
        "curve": {part: curve[part] for part in ("train", "validation")},
    }


def one_shot(sparsity: float, options: argparse.Namespace) -> Path:
    """The folder of ALPS' model, made if it isn't there."""
    folder: Path = (options.one_shot or options.work) / f"alps-{sparsity:g}-{options.allocation}"
    if not folder.exists():
        calibration = CalibrationConfig(options.calibration or options.text, 128, 2048)
        prune_folder(
            options.model,
            folder,
            "alps",
            sparsity,
            allocation=options.allocation,
            calibration=calibration,
            device=options.device,
            progress=False,
        )
    return folder


def measured(folder: Path, options: argparse.Namespace) -> float:
    model, tokenizer = load_folder(folder, options.device, torch.float32 if options.device == "cpu" else None)
    text = load_text(options.test)
    return perplexity(model, text, tokenizer, window=2048, max_windows=options.max_windows, progress=False).perplexity


def draw(result: dict[str, Any], image: Path) -> None:
    """Loss on held-back text over tokens, a line for each case."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for case in result["cases"]:
        each = case["tokens"] / case["steps"] / 1e6
        points = [(row["step"] * each, row["loss"]) for row in case["curve"]["validation"]]
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=f"{case['name']}: {case['perplexity']:.2f}")
    axes.set(xlabel="million tokens", ylabel="cross-entropy on held-back text, nats a token")
    axes.set_title("Retraining; behind the names the perplexity on WikiText-2's test set")
    axes.set_ylim(top=min(axes.get_ylim()[1], 6))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(image, dpi=120)


def markdown(result: dict[str, Any]) -> str:
    """The cases, each beside the dense model with the same training."""
    cases = result["cases"]
    dense = min((case["perplexity"] for case in cases if case["name"].startswith("dense")), default=None)
    lines = ["| case | starts from | zeros | perplexity | beside dense | million tokens | minutes |", "|---" * 7 + "|"]
    for case in cases:
        beside = "" if dense is None or not case["zeros"] else f"{case['perplexity'] / dense - 1:+.1%}"
        lines.append(
            f"| {case['name']} | {case['start']} | {case['zeros']:.0%} | {case['perplexity']:.2f} | {beside} | "
            f"{case['tokens'] / 1e6:.1f} | {case['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--text", help="to train on")
    parser.add_argument("--calibration", help="text for ALPS to look at, if another")
    parser.add_argument("--test", type=Path, help="text that perplexity is measured on")
    parser.add_argument("--work", type=Path, help="folder for the models")
    parser.add_argument("--one-shot", type=Path, help="folder that has ALPS' models, if not WORK")
    parser.add_argument("--allocation", default="uniform", help="of ALPS' models: uniform, owl or error")
    parser.add_argument("--out", type=Path, default=Path("retrain.json"))
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help='settings, such as {"lr": 1e-3}')
    parser.add_argument("--suffix", default="", help="of the cases' names, where --set makes them others")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further case after so long")
    parser.add_argument("--max-windows", type=int, help="measure perplexity on the first ones alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw the loss curves of a result")
    parser.add_argument("--print", type=Path, metavar="JSON", help="only print a result as Markdown")
    parser.add_argument("--image", type=Path, default=Path("retraining.png"))
    options = parser.parse_args()
    if (
        not options.draw
        and not options.print
        and not (options.model and options.text and options.test and options.work)
    ):
        parser.error("MODEL, --text, --test and --work are needed; --draw JSON or --print JSON to show")
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"unknown case {unknown[0]}; known are {', '.join(CASES)}")
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
