"""``flash-llm VERB``: the command line. One function a verb, and each calls one function of the library.

Whatever takes long to import is imported inside of the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from flash_llm import cli_plan, cli_tune
from flash_llm.bench import cli as bench
from flash_llm.cli_compare import compare
from flash_llm.cli_options import (
    Device,
    Dtype,
    Json,
    Limit,
    MaxWindows,
    Out,
    RunDtype,
    Skip,
    Tasks,
    Text,
    Values,
    Window,
    task_names,
)
from flash_llm.cli_retrain import retrain
from flash_llm.errors import FlashLLMError

if TYPE_CHECKING:
    import torch

    from flash_llm.checkpoint import FolderInfo

INTERRUPTED = 130


@dataclass
class _State:
    """What the options before the verb say."""

    debug: bool = False


_state = _State()


class PackedDtype(str, Enum):
    """Floating-point types that weights can be packed in."""

    float16 = "float16"
    bfloat16 = "bfloat16"


class _Group(TyperGroup):
    """Takes ``--debug`` anywhere on the line, before the verb or after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="flash-llm",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point."""
    app(prog_name="flash-llm")


def _guard(function: Callable[..., None]) -> Callable[..., None]:
    """The function with failures that are one line and an exit code."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = _show_warning
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except typer.Exit:
            raise
        except Exception as error:
            if _state.debug:
                traceback.print_exc()
            _say(f"error: {_describe(error)}")
            raise typer.Exit(1) from None

    return guarded


def _verb(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a function a verb of the command line."""
    guarded = _guard(function)
    app.command(name=function.__name__.rstrip("_"))(guarded)
    return guarded


app.add_typer(bench.make_app(_guard), name="bench")


_CALLED_HERE = {
    "resume=False": "--restart",
    "calibration=CalibrationConfig(file)": "--calibration FILE",
    "min_sparsity=0": "--min-sparsity 0",
    "flash_llm.prune": "`flash-llm prune`",
    "include_lm_head": "--include-lm-head",
}
"""What messages name as one writes it in Python, and how on the command line."""


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        places = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
        return f"{error.strerror}: {places}" if places else error.strerror
    words = " ".join(str(error).split())
    for in_python, here in _CALLED_HERE.items():
        words = words.replace(in_python, here)
    expected = (
        FlashLLMError,
        OSError,
        ValueError,
        TypeError,
        ImportError,
        RuntimeError,
        MemoryError,
        NotImplementedError,
    )
    if isinstance(error, expected) and words:
        return words
    return f"{type(error).__name__}: {words} (unexpected; --debug shows where, `flash-llm env` what a report needs)"


def _say(line: str) -> None:
    """A line for the person, on standard error: standard output holds results alone."""
    print(line, file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings as one line each; those for developers only with ``--debug``."""
    if _state.debug or not issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
        _say(f"warning: {' '.join(str(message).split())}")


def _version(wanted: bool) -> None:
    if wanted:
        from flash_llm import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _top(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prune a language model, compress it, and run it from the compressed weights.

    MODEL and DIR are Hugging Face model folders: config.json, *.safetensors, tokenizer.

    \b
    Examples:
      flash-llm prune MODEL --sparsity 0.5 --calibration text.txt --out PRUNED
      flash-llm compress PRUNED --out SMALL
      flash-llm inspect SMALL
      flash-llm generate SMALL "The capital of France is"
      flash-llm evaluate SMALL --text wikitext2-test.txt
    """
    _state.debug = debug


@_verb
def prune(
    model: Annotated[Path, typer.Argument(help="Dense model folder.")],
    out: Out,
    method: Annotated[
        str, typer.Option(help='"magnitude", "wanda", "sparsegpt" or "alps": from quick to good.')
    ] = "wanda",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights to drop: 0 up to, not including, 1. Default: 0.5.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help='Instead of a sparsity: the least with which the compressed weights fit, as in "24GB".'),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(
            help='How it is spread over the layers: "uniform", "owl" (by outliers), "error" (least measured error: the '
            "best, and takes some times as long)."
        ),
    ] = "uniform",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text that the method looks at: .txt, .jsonl (also .gz), or a data set as name[:config[:split]]."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Which windows of the text are taken.")] = 0,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
    include_lm_head: Annotated[bool, typer.Option("--include-lm-head", help="Prune the output layer too.")] = False,
    skip: Skip = None,
    values: Annotated[
        Values,
        typer.Option(
            help="Also round what is left to 8 bits, with a scale for each row; by sparsegpt and alps so that weights "
            "make up for each other's rounding."
        ),
    ] = Values.bits16,
    compress: Annotated[
        bool, typer.Option("--compress", help="Compress the result: OUT is what `compress` makes.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an interrupted run instead of taking it up.")
    ] = False,
) -> None:
    """Set the least important weights of a model to zero.

    Interrupted, it goes on from the last finished block when it is called again with the same arguments.

    \b
    Examples:
      flash-llm prune MODEL --sparsity 0.5 --calibration text.txt --out PRUNED
      flash-llm prune MODEL --method magnitude --sparsity 0.3 --out PRUNED
      flash-llm prune MODEL --method alps --allocation error --sparsity 0.7 --calibration text.txt --out PRUNED
      flash-llm prune MODEL --sparsity 0.6 --calibration text.jsonl.gz --compress --out SMALL
      flash-llm prune MODEL --method alps --sparsity 0.5 --values fp8 --calibration text.txt --compress --out SMALL
      flash-llm prune MODEL --budget 24GB --calibration text.txt --compress --out SMALL
    """
    from flash_llm.budget import parse_bytes, sparsity_for_bytes
    from flash_llm.prune import CalibrationConfig, prune_folder

    target = out
    if compress:
        _require_free(out)
        target = out.with_name(f"{out.name}.pruned")
    if budget is not None:
        if sparsity is not None:
            raise ValueError("--sparsity and --budget say the same thing; give one of them.")
        sparsity = sparsity_for_bytes(
            model, parse_bytes(budget), include_lm_head=include_lm_head, skip=skip or [], values=values.value
        )
        _say(f"{budget} take a sparsity of {sparsity:.1%}")
    device = usable_device(device)
    report = prune_folder(
        model,
        target,
        method=method,
        sparsity=0.5 if sparsity is None else sparsity,
        allocation=allocation,
        calibration=None if calibration is None else CalibrationConfig(calibration, samples, seqlen, seed),
        device=device,
        dtype=_dtype(dtype, device),
        include_lm_head=include_lm_head,
        skip=skip or [],
        values=values.value,
        resume=not restart,
    )
    _say(f"pruned {len(report.layers)} layers: {report.zeros:,} of {report.weights:,} weights are zero")
    if compress:
        try:
            _compress(target, out, device=device)
        except BaseException:
            _say(f"the pruned model is in {target}; go on with: flash-llm compress {target} --out {out}")
            raise
        shutil.rmtree(target)
    print(out)


@_verb
def compress(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Pruned model folder.")],
    out: Out,
    dtype: Annotated[
        PackedDtype | None,
        typer.Option(help="Type of the packed weights. Default: the model's own, bfloat16 for float32."),
    ] = None,
    values: Annotated[
        Values | None,
        typer.Option(
            help="How nonzeros are stored: as they are, or rounded to 8 bits with a scale for each row. Default: what "
            "the model was pruned for, else 16-bit."
        ),
    ] = None,
    skip: Skip = None,
    min_sparsity: Annotated[
        float | None,
        typer.Option(help="Leave layers dense that have fewer zeros; 0 packs all. Default: those that hardly shrink."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Pack the pruned layers of a model: the same weights in fewer bytes.

    Layers that would not get smaller stay dense; `inspect` says which and why.

    \b
    Examples:
      flash-llm compress PRUNED --out SMALL
      flash-llm compress PRUNED --skip 'layers\\.0\\.' --out SMALL
      flash-llm compress PRUNED --values int8 --out SMALLER
    """
    device = usable_device(device)
    _compress(model, out, device=device, dtype=dtype, values=values, skip=skip, min_sparsity=min_sparsity)
    print(out)


@_verb
def decompress(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model folder.")],
    out: Out,
) -> None:
    """Make the dense model folder again that a compressed one came from.

    \b
    Examples:
      flash-llm decompress SMALL --out PRUNED
    """
    from flash_llm.checkpoint import decompress_folder

    decompress_folder(model, out)
    print(out)


@_verb
def generate(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder, compressed or dense.")],
    prompt: Annotated[str, typer.Argument(help='Text to continue; "-" reads it from standard input.')],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token; higher: more varied.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choices that a temperature makes.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user in the model's chat template.")] = False,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
) -> None:
    """Continue a text, or answer a question, token by token.

    \b
    Examples:
      flash-llm generate SMALL "The capital of France is"
      flash-llm generate SMALL --chat --temperature 0.7 "Write a haiku about sparse matrices."
      echo "Once upon a time" | flash-llm generate SMALL - --max-new-tokens 20
    """
    prompt = sys.stdin.read() if prompt == "-" else prompt
    loaded, tokenizer = load_model(model, device, dtype)
    inputs = _encode(tokenizer, prompt, chat).to(loaded.device)

    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None}
    if not temperature:  # what a model's generation_config says of sampling makes no sense with it off
        sampling |= {"top_p": None, "top_k": None}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - start
    tokens = output.shape[1] - inputs["input_ids"].shape[1]
    speed = f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s"
    _say(f"{speed}, on {loaded.device} in {_name(loaded.dtype)}")


@_verb
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder, compressed or dense.")],
    text: Text,
    window: Window = 2048,
    max_windows: MaxWindows = None,
    tasks: Tasks = "",
    limit: Limit = None,
    device: Device = "auto",
    dtype: RunDtype = Dtype.auto,
    json_: Json = False,
) -> None:
    """Measure a model's perplexity on a text, as in the SparseGPT and Wanda papers.

    \b
    Examples:
      flash-llm evaluate SMALL --text wikitext2-test.txt
      flash-llm evaluate SMALL --text wikitext2-test.txt --window 1024 --max-windows 16 --json
      flash-llm evaluate SMALL --text wikitext2-test.txt --tasks piqa,arc_easy
    """
    from flash_llm.evaluate import load_text, perplexity
    from flash_llm.tasks import run_tasks

    words = load_text(text)
    loaded, tokenizer = load_model(model, device, dtype)
    result = perplexity(loaded, words, tokenizer, window=window, max_windows=max_windows)
    scores = run_tasks(loaded, tokenizer, task_names(tasks), limit=limit) if tasks else {}
    if json_:
        where = {"model": str(model), "text": str(text), "device": str(loaded.device), "dtype": _name(loaded.dtype)}
        _print_json(vars(result) | where | ({"tasks": scores} if tasks else {}))
        return
    print(
        f"perplexity {result.perplexity:.4f}  ({result.windows} windows of {result.window} tokens, "
        f"{result.tokens} predicted, {_name(loaded.dtype)} on {loaded.device}, {result.seconds:.1f} s)"
    )
    for task, metrics in scores.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


@_verb
def inspect(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder, compressed or dense.")],
    json_: Json = False,
) -> None:
    """Show what a model folder holds: each layer's shape, sparsity, bytes and ratio, and the totals.

    \b
    Examples:
      flash-llm inspect SMALL
      flash-llm inspect SMALL --json | jq .totals
    """
    from flash_llm.checkpoint import read_folder

    info = read_folder(model)
    if json_:
        _print_json(info.to_dict())
    else:
        _print_folder(info)


@_verb
def verify(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model folder.")],
    accept_config: Annotated[
        bool, typer.Option("--accept-config", help="Sign config.json as it now is: you edited it, and meant it.")
    ] = False,
) -> None:
    """Check every byte of a compressed model against the checksums that it was written with.

    \b
    Examples:
      flash-llm verify SMALL
      flash-llm verify SMALL --accept-config     # after an edit of config.json that was meant
    """
    from flash_llm.checkpoint import accept_config as accept
    from flash_llm.checkpoint import verify_folder

    if accept_config:
        accept(model)
    tensors = verify_folder(model)
    print(f"{model}: {tensors} tensors and config.json are as they were written")


_verb(cli_plan.plan)
_verb(cli_tune.tune)
_verb(retrain)
_verb(compare)


@_verb
def env(json_: Json = False) -> None:
    """Describe this machine: versions, GPUs, compiler; what a bug report needs.

    \b
    Examples:
      flash-llm env
      flash-llm env --json > report.json
    """
    from flash_llm.environment import environment

    report = environment()
    if json_:
        _print_json(report)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in _flatten(report):
        table.add_row(name, value)
    _console().print(table)


def _flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries and lists as rows of dotted names and words."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flatten(inner, f"{name}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [row for i, inner in enumerate(value) for row in _flatten(inner, f"{name}.{i}")] or [(name, "none")]
    if name.endswith("memory_bytes") and value is not None:
        return [(name.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB")]
    return [(name, "-" if value is None else str(value))]


def _compress(
    model: Path,
    out: Path,
    *,
    device: str,
    dtype: PackedDtype | None = None,
    values: Values | None = None,
    skip: list[str] | None = None,
    min_sparsity: float | None = None,
) -> None:
    from flash_llm.checkpoint import compress_folder
    from flash_llm.nn import DEFAULT_SKIP

    report = compress_folder(
        model,
        out,
        skip=(*DEFAULT_SKIP, *(skip or [])),
        dtype=dtype and dtype.value,
        values=values and values.value,
        device=device,
        min_sparsity=min_sparsity,
    )
    stored = report.dtype if report.values == Values.bits16.value else f"{report.dtype} from {report.values} values"
    _say(
        f"packed {len(report.packed)} layers in {stored}, {len(report.skipped)} stay dense: "
        f"{_size(report.source_nbytes)} became {_size(report.nbytes)} ({report.nbytes / report.source_nbytes:.1%})"
    )


def _print_folder(info: FolderInfo) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for title in ("shape", "dtype", "zeros", "bytes", "dense", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("kept dense because")
    for layer in info.layers:
        table.add_row(
            layer.name,
            "x".join(map(str, layer.shape)),
            layer.dtype if layer.values == Values.bits16.value else layer.values,
            _percent(layer.sparsity),
            _size(layer.nbytes),
            _size(layer.dense_nbytes),
            _percent(layer.ratio),
            "" if layer.packed or not info.compressed else layer.reason,
        )
    table.add_section()
    linear = sum(layer.nbytes for layer in info.layers)
    rows = {
        f"{len(info.layers)} linear layers": (linear, info.dense_nbytes - info.other_nbytes),
        "all else": (info.other_nbytes, info.other_nbytes),
        "total": (info.nbytes, info.dense_nbytes),
    }
    for name, (nbytes, dense) in rows.items():
        ratio = _percent(nbytes / dense if dense else None)
        table.add_row(name, "", "", "", _size(nbytes), _size(dense), ratio, "", style="bold")
    _console().print(table)


def _size(nbytes: int) -> str:
    """Bytes in the largest decimal unit that leaves a number of 1 or more."""
    power = min(max(0, (len(str(nbytes)) - 1) // 3), 4)
    return f"{nbytes} B" if power == 0 else f"{nbytes / 1000**power:.2f} {' kMGT'[power]}B"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _require_free(out: Path) -> None:
    """Says now what would else be said after hours of pruning."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: name another, or remove it")


def usable_device(device: str) -> str:
    """The device that "auto" stands for, or the one asked for, if it is there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f'device {device!r} is none; take "cpu", "cuda", "cuda:1" or "auto"') from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch sees {torch.cuda.device_count()} GPUs here; take --device cpu")
    return device


def _dtype(dtype: Dtype, device: str) -> torch.dtype | None:
    """What to compute in; None: the model's own. 16-bit matrix products on a CPU are slower than those of float32."""
    import torch

    if dtype is Dtype.auto:
        return torch.float32 if device == "cpu" else None
    return getattr(torch, dtype.value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_model(folder: Path, device: str, dtype: Dtype) -> tuple[Any, Any]:
    """A model, compressed or dense, ready to run, and its tokenizer."""
    device = usable_device(device)
    if not (folder / "config.json").is_file():
        what = "has no config.json: it is no model folder" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {what}; a Hugging Face model must be downloaded first")
    tame_transformers()
    from flash_llm.compare import load_folder

    return load_folder(folder, device, _dtype(dtype, device))


@functools.cache
def tame_transformers() -> None:
    """Its log lines become one line each, and its bars show on a terminal alone."""
    from transformers.utils import logging as library

    class OneLine(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _say(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")

    library.set_verbosity_warning()
    library.disable_default_handler()
    library.add_handler(OneLine())
    if not sys.stderr.isatty():
        library.disable_progress_bar()


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model has no chat template, so it can't be asked with --chat; leave that out")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise ValueError("the prompt is empty, and the model needs at least one token to go on from")
    return inputs


def _console() -> Console:
    """Standard output; tables are as wide as they must be where no terminal limits them."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _print_json(value: dict[str, Any]) -> None:
    # JSON knows neither infinity nor NaN.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    print(json.dumps(plain, indent=2, allow_nan=False))
