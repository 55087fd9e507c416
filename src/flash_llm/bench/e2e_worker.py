"""One process of ``flash-llm bench e2e``: starts vLLM with one kind of weights, and measures.

Appends lines of JSON to a file, each with its ``kind``: "environment", "results" or "not_measured". A row of results
(to which :func:`flash_llm.bench.e2e.loading` adds):

- ``weights``, ``sparsity``, ``gpus``, ``batch``, ``input_len``, ``output_len``;
- ``tokens_per_second``, ``tokens_per_gpu_second``: output tokens over the whole time, prefill and all;
- ``time_to_first_token_ms``: of a batch that comes at once, till all requests have their first token;
- ``time_per_output_token_ms``: mean time of the decode steps after that;
- ``weight_bytes`` of one GPU, ``kv_cache_tokens`` that fit beside them, ``largest_batch`` of such requests;
- ``start_s``: seconds to start, loading and compiling included;
- ``breakdown_us``, if asked for: kernel time by kind of a decode step in the middle of the output.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from flash_llm import __version__
from flash_llm.bench import e2e_inside
from flash_llm.bench.e2e import LARGEST, sparsity
from flash_llm.environment import driver_version

_FIRST_TOKEN_RUNS = 7  # many, since a short prompt waits for the host, which other work delays
_PROFILED_TOKENS = 17
_VOCABULARY = 30000  # no model here has fewer


def main(task_path: str) -> None:
    task = json.loads(Path(task_path).read_text())

    def say(kind: str, row: dict[str, Any]) -> None:
        with open(task["lines"], "a") as file:
            file.write(json.dumps({"kind": kind, **row}) + "\n")

    begin = time.perf_counter()
    llm = _engine(task)
    start = {"start_s": time.perf_counter() - begin}
    say("environment", environment(llm))
    tokens = int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens or 0)
    memory = {"weight_bytes": max(llm.apply_model(e2e_inside.weight_bytes)), "kv_cache_tokens": tokens}
    vocabulary = min(_VOCABULARY, llm.llm_engine.vllm_config.model_config.get_vocab_size())

    def seconds(batch: int, input_len: int, output_len: int) -> float:
        return _generate(llm, batch, input_len, output_len, vocabulary)

    for input_len in task["input_lens"]:
        request = input_len + task["output_len"]
        largest = min(tokens // (-(-request // 16) * 16), task["engine"]["max_num_seqs"])  # vLLM's blocks of 16 tokens
        for batch in sizes(task["batches"], largest):
            what = {"weights": task["weights"], "gpus": task["gpus"], "batch": batch, "input_len": input_len}
            if batch > largest:
                say("not_measured", what | {"why": f"the KV cache has {tokens} tokens: {largest} requests at a time"})
                continue
            row = what | {"sparsity": sparsity(task["weights"]), "output_len": task["output_len"], **start, **memory}
            row |= {"largest_batch": largest} | timed(seconds, batch, input_len, task["output_len"], task["gpus"])
            if task["breakdown"]:
                row["breakdown_us"] = _breakdown(llm, seconds, batch, input_len + task["output_len"] // 2)
            say("results", row)


def sizes(batches: list[str], largest: int) -> list[int]:
    """Batch sizes in rising order, "max" as the largest that fits."""
    return sorted({largest if batch == LARGEST else int(batch) for batch in batches} - {0})


def timed(
    seconds: Callable[[int, int, int], float], batch: int, input_len: int, output_len: int, gpus: int
) -> dict[str, float]:
    """The figures of a row. ``seconds(batch, input_len, output_len)`` runs it once."""
    seconds(batch, input_len, 2)  # what is compiled or loaded at first use
    first = statistics.median(seconds(batch, input_len, 1) for _ in range(_FIRST_TOKEN_RUNS))
    whole = seconds(batch, input_len, output_len)
    rate = batch * output_len / whole
    return {
        "tokens_per_second": rate,
        "tokens_per_gpu_second": rate / gpus,
        "time_to_first_token_ms": first * 1e3,
        "time_per_output_token_ms": (whole - first) / (output_len - 1) * 1e3,
    }


def _engine(task: dict[str, Any]) -> Any:
    from flash_llm.integrations.vllm import register

    register()
    if not any("flash_llm" in point.value for point in entry_points(group="vllm.general_plugins")):
        if task["gpus"] > 1:
            raise RuntimeError("vLLM's workers find flash_llm only if it is installed: pip install --no-deps PROJECT")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the plugin is known to this process alone
    from vllm import LLM

    return LLM(**task["engine"])


def _generate(llm: Any, batch: int, input_len: int, output_len: int, vocabulary: int) -> float:
    """Seconds of a batch of random requests, greedily, each to its full length."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7919 * i + 31 * j) % (vocabulary - 10) + 5 for j in range(input_len)]}
        for i in range(batch)
    ]
    sampling = SamplingParams(max_tokens=output_len, temperature=0, detokenize=False, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def environment(llm: Any) -> dict[str, Any]:
    """The GPU, the versions, and how the engine runs: figures depend on them.

    ``engine_process`` is "own" where the scheduler and the model have a process beside the one that sends requests, as
    with ``vllm serve``, and "shared" where all is one process. With ``async_scheduling`` a step is prepared while the
    one before runs.
    """
    import vllm
    from vllm import envs
    from vllm.platforms import current_platform

    own = bool(envs.VLLM_ENABLE_V1_MULTIPROCESSING)
    scheduling = bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling)
    # Torch would need a context on the GPU to say its name, and memory for that.
    gpu = current_platform.get_device_name() if current_platform.is_cuda() else None
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    return {
        "gpu": gpu,
        **versions,
        "driver": driver_version(),
        "flash_llm": __version__,
        "engine_process": "own" if own else "shared",
        "async_scheduling": scheduling,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


# Where a decode step's time goes.


def _breakdown(llm: Any, seconds: Callable[[int, int, int], float], batch: int, context: int) -> dict[str, float]:
    """Microseconds of a decode step by kind of kernel, on the first GPU: a run of many tokens less one of one token.

    Args:
        context: tokens before them. What attention reads grows with it.
    """

    def kernels(output_len: int) -> dict[str, float]:
        llm.collective_rpc(e2e_inside.start_profile)
        seconds(batch, context, output_len)
        return llm.collective_rpc(e2e_inside.stop_profile)[0]

    long, short = kernels(_PROFILED_TOKENS), kernels(1)
    steps = _PROFILED_TOKENS - 1
    return {kind: max(0.0, (us - short.get(kind, 0.0)) / steps) for kind, us in long.items()}


if __name__ == "__main__":
    main(sys.argv[1])
