"""Throughput and latency of whole models in vLLM: dense, quantized and sparse weights, one engine and one command.

``flash-llm bench e2e`` is the command. Each kind of weights has a process of its own (``e2e_worker.py``), so that the
next one finds the GPU's memory free; it appends a line of JSON to a file as soon as a row is measured, so that nothing
is lost when time runs out.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flash_llm.capacity.models import BUILT_IN
from flash_llm.capacity.sizes import sparse_format
from flash_llm.checkpoint import QUANT_METHOD
from flash_llm.folder import CONFIG, read_config
from flash_llm.integrations.vllm import DUMMY_SPARSITY, DUMMY_VALUES
from flash_llm.tensor import ValueKind

Row = dict[str, Any]

QUANTIZED = ("fp8", "int4")
LARGEST = "max"
_ARCHITECTURES = {
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_INT4 = {  # what vLLM runs with its Machete kernel on Hopper: groups of 128 weights with one scale
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
}
_POLL_S = 1.0
_GRACE_S = 15.0
_BEFORE_ERROR = re.compile(  # on an error's line: a progress bar, or the prefix of a process of the engine
    r"^.*(it/s|s/it)\]|^\(\w+ pid=\d+\)\s*(ERROR [\d-]+ [\d:]+ \[[^\]]*\])?"
)
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to workers
    "PYTHONFAULTHANDLER": "1",  # a process that crashes says where
}
"""Of the process that is measured, unless the caller's own says otherwise."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        model: a name of ``capacity.models.BUILT_IN``, or a folder whose config.json describes the model.
        weights: kinds, each "dense", "fp8", "int4", a share of zeros such as "0.8" (or "0.8+fp8", "0.8+int8" for
            nonzeros of 8 bits), or a folder. All but folders are random weights of the model's shapes; a folder is
            loaded as it is.
        batches: requests at a time; "max" is the most whose tokens fit into the KV cache, up to ``max_batch``.
        input_lens, output_len: tokens of a request.
        gpus: tensor-parallel size.
        dtype: of dense weights and of what layers compute in.
        memory_share: of a GPU, for vLLM.
        max_batch: requests at a time that vLLM is started for.
        breakdown: also measure what kinds of kernels a decode step's time goes into.
        eager: no compilation and no CUDA graphs.
        engine: further options of ``vllm.LLM``, the same for all kinds.
        time_limit: seconds for everything.

    Raises:
        ValueError: a value that makes no sense, with what would.
    """

    model: str
    weights: list[str]
    batches: list[str]
    input_lens: list[int]
    output_len: int
    gpus: int = 1
    dtype: str = "float16"
    memory_share: float = 0.94
    max_batch: int = 256
    breakdown: bool = False
    eager: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    time_limit: float = math.inf

    def __post_init__(self) -> None:
        if self.model not in BUILT_IN and not (Path(self.model) / CONFIG).is_file():
            raise ValueError(f"model {self.model!r} is no folder with a {CONFIG}, and none of {', '.join(BUILT_IN)}")
        for kind in self.weights:
            _check_kind(kind)
        for batch in self.batches:
            if batch != LARGEST and not (batch.isdigit() and int(batch) >= 1):
                raise ValueError(f"batch {batch!r}: it takes a number of requests, at least 1, or {LARGEST!r}")
        for name, value, least in (
            ("input length", min(self.input_lens), 1),
            ("output length", self.output_len, 2),
            ("gpus", self.gpus, 1),
            ("largest batch", self.max_batch, 1),
        ):
            if value < least:
                raise ValueError(f"{name} {value}: it takes at least {least}")
        if not 0 < self.memory_share < 1:
            raise ValueError(f"memory share {self.memory_share}: it takes a number between 0 and 1")
        taken = self.engine.keys() & _own_options(self, "fp8", "").keys()
        if taken:
            raise ValueError(f"engine option {min(taken)!r} is what the benchmark sets itself: see its other options")
        if not self.time_limit > 0:
            raise ValueError(f"time limit {self.time_limit}: it takes seconds, more than 0")


def _check_kind(kind: str) -> None:
    if kind == "dense" or kind in QUANTIZED or sparsity(kind) is not None or (Path(kind) / CONFIG).is_file():
        return
    raise ValueError(
        f"weights {kind!r}: it takes dense, {', '.join(QUANTIZED)}, a share of zeros such as 0.8 (with nonzeros of 8 "
        f"bits: 0.8+fp8 or 0.8+int8), or a model folder"
    )


def sparsity(kind: str) -> float | None:
    """The share of zeros that a kind of weights names, if it names one."""
    try:
        return sparse_format(kind).sparsity
    except ValueError:
        return None


def model_config(settings: Settings, kind: str) -> dict[str, Any]:
    """The config.json of a model with random weights of a kind."""
    if settings.model in BUILT_IN:
        config = dict(BUILT_IN[settings.model])
        config["architectures"] = [_ARCHITECTURES[config["model_type"]]]
    else:
        config = read_config(Path(settings.model))
        config.pop("quantization_config", None)
    config["dtype"] = settings.dtype
    share = sparsity(kind)
    if share is not None:
        values = sparse_format(kind).values
        of_8_bits = {} if values is ValueKind.BITS16 else {DUMMY_VALUES: values.value}
        config["quantization_config"] = {"quant_method": QUANT_METHOD, DUMMY_SPARSITY: share, **of_8_bits}
    elif kind == "int4":
        config["quantization_config"] = _INT4
    return config


def engine_options(settings: Settings, kind: str, folder: str) -> dict[str, Any]:
    """What ``vllm.LLM`` is made with."""
    return settings.engine | _own_options(settings, kind, folder)


def _own_options(settings: Settings, kind: str, folder: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": folder,
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "max_model_len": max(settings.input_lens) + settings.output_len + 16,
        "max_num_seqs": _most_requests(settings),
        "gpu_memory_utilization": settings.memory_share,
        "tensor_parallel_size": settings.gpus,
        "enable_prefix_caching": False,
        "enforce_eager": settings.eager,
        "disable_log_stats": True,
    }
    if folder != kind:
        options["load_format"] = "dummy"
    if kind == "fp8":
        options["quantization"] = "fp8"
    return options


def _most_requests(settings: Settings) -> int:
    most = max((int(batch) for batch in settings.batches if batch != LARGEST), default=1)
    return max(most, settings.max_batch) if LARGEST in settings.batches else most


def measure(
    settings: Settings,
    *,
    command: str = "",
    log_dir: Path | None = None,
    on_change: Callable[[dict[str, Any]], None] = lambda report: None,
    run: Callable[..., str | None] | None = None,
) -> dict[str, Any]:
    """Measures all kinds of weights, one after the other.

    Args:
        command: what the user typed, for the report.
        log_dir: where each process's output goes, as ``e2e-KIND.log``; None drops it.
        on_change: is given the report whenever a row has come.
        run: in place of :func:`run_worker`, for tests.

    Returns:
        JSON-ready: ``environment``, ``settings``, ``results`` (see ``e2e_worker``) and ``not_measured``, each with the
        reason.

    Raises:
        ImportError: vLLM isn't installed.
    """
    start = time.monotonic()
    if run is None and importlib.util.find_spec("vllm") is None:
        raise ImportError("models are measured in vLLM, which isn't installed: pip install vllm")
    report: dict[str, Any] = {
        "environment": {"command": command},
        "settings": {k: v if v != math.inf else None for k, v in vars(settings).items()},
        "results": [],
        "not_measured": [],
    }

    def take(line: Row) -> None:
        kind = line.pop("kind")
        report["environment"] |= line if kind == "environment" else {}
        if kind in ("results", "not_measured"):
            report[kind].append(line)
        on_change(report)

    for name in settings.weights:
        left = settings.time_limit - (time.monotonic() - start)
        if left <= _GRACE_S:
            why: str | None = f"the time limit of {settings.time_limit:g} s"
        else:
            with tempfile.TemporaryDirectory(prefix="flash-llm-e2e-") as scratch:
                why = (run or run_worker)(settings, name, Path(scratch), log_dir, left, take)
        if why is not None:
            take({"kind": "not_measured", "weights": name, "why": why})
    return report


def run_worker(
    settings: Settings, kind: str, scratch: Path, log_dir: Path | None, seconds: float, take: Callable[[Row], None]
) -> str | None:
    """Measures one kind of weights in a process of its own. Returns why it ended early, or None."""
    folder = kind
    if not (Path(kind) / CONFIG).is_file():
        folder = str(scratch / "model")
        Path(folder).mkdir()
        (Path(folder) / CONFIG).write_text(json.dumps(model_config(settings, kind)))
    task, lines = scratch / "task.json", scratch / "lines.jsonl"
    # Rows are measured from the smallest batch on, so that what comes first is what is surely there.
    plan = {name: getattr(settings, name) for name in ("batches", "input_lens", "output_len", "gpus", "breakdown")}
    plan |= {"weights": kind, "engine": engine_options(settings, kind, folder), "lines": str(lines)}
    task.write_text(json.dumps(plan))
    lines.touch()
    log_path = Path(os.devnull) if log_dir is None else log_dir / f"e2e-{kind.replace('/', '_')}.log"
    tail = scratch / "output" if log_dir is None else log_path
    files = Path(folder) if folder == kind else None

    def take_row(line: Row) -> None:
        take(line | loading(tail, files) if line["kind"] == "results" else line)

    end = time.monotonic() + seconds
    with tail.open("wb") as log, lines.open() as new:
        process = subprocess.Popen(
            [sys.executable, "-m", "flash_llm.bench.e2e_worker", str(task)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**_ENVIRONMENT, **os.environ},
            start_new_session=True,
        )
        try:
            late = _watch(process, end, new, take_row)
        finally:
            _stop(process)
        _pass_on(new, take_row)
    if late:
        return f"the time limit of {settings.time_limit:g} s"
    return None if process.returncode == 0 else _last_error(tail)


def loading(log: Path, folder: Path | None) -> dict[str, float | None]:
    """What vLLM's log says of loading, and nothing else tells, since other processes may have done it.

    Args:
        log: what vLLM has printed.
        folder: of the weights' files; None if weights are random.

    Returns:
        ``load_s``: seconds to read the weights and, on a GPU, to check and place them, of the slowest process; None if
        the log has none. ``load_gigabytes_a_second``: the files' bytes over that, if there are files.
    """
    found = re.findall(r"(Loading weights|Model loading) took .*?([\d.]+) seconds", log.read_text(errors="replace"))
    times = [float(seconds) for what, seconds in found if what == found[-1][0]]
    seconds, rate = max(times, default=None), None
    if seconds and folder is not None:
        rate = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / seconds * 1e-9
    return {"load_s": seconds, "load_gigabytes_a_second": rate}


def _watch(process: subprocess.Popen[bytes], end: float, new: Any, take: Callable[[Row], None]) -> bool:
    """Passes lines on until the process ends (False) or time is up (True)."""
    while True:
        try:
            process.wait(timeout=max(0.0, min(_POLL_S, end - time.monotonic())))
            return False
        except subprocess.TimeoutExpired:
            _pass_on(new, take)
            if time.monotonic() >= end:
                return True


def _pass_on(new: Any, take: Callable[[Row], None]) -> None:
    while line := new.readline():
        take(json.loads(line))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it started, which are of its session."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=_GRACE_S / 2)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _last_error(log: Path) -> str:
    """The last line of a log that looks like an error's, and doesn't only say that another process has told more."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    wrong = [line for line in lines if "Error" in line or "error:" in line.lower()]
    telling = [line for line in wrong if not (line.lstrip().startswith("raise ") or " WARNING " in line)]
    causes = [line for line in telling if "root cause above" not in line]
    found = _BEFORE_ERROR.sub("", (causes or telling or lines or ["it ended without a word"])[-1])
    return " ".join(found.split())[-400:]
