"""Runs vLLM in a process of its own, for the tests beside this: ``python vllm_process.py TASK.json``.

The task is a list of runs, each a dictionary: ``options`` of vllm.LLM, ``prompts`` of token ids, ``tokens`` to
generate greedily. The last line printed is the runs' outcomes as JSON: for every prompt ``tokens`` and, of every step,
``margins``: by how much the best token's logarithm of probability exceeds the second best's. A run that fails is
``{"error": words}``.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SOURCE = HERE.parents[2] / "src"
ENTRY_POINT = "[vllm.general_plugins]\nflash_llm = flash_llm.integrations.vllm:register\n"


def environment(scratch: Path, **more: str) -> dict[str, str]:
    """Of a process in which vLLM finds the plugin as if the package were installed."""
    info = scratch / "site" / "flash_llm-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-llm\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    _name_vllm(info.parent)
    paths = [str(SOURCE), str(info.parent), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {**os.environ, **own, **more}


def _name_vllm(site: Path) -> None:
    """``vllm serve`` asks for the version of a package called vllm, which the CPU build is not called."""
    try:
        version("vllm")
    except PackageNotFoundError:
        made = site / "vllm-0.dist-info"
        made.mkdir(exist_ok=True)
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")


def generate(scratch: Path, runs: list[dict[str, Any]], timeout: float = 300, **more: str) -> list[Any]:
    """The runs' outcomes, one after the other in one process."""
    scratch.mkdir(exist_ok=True)
    task = scratch / "task.json"
    task.write_text(json.dumps(runs))
    command = [sys.executable, str(HERE), str(task)]
    done = subprocess.run(
        command, env=environment(scratch, **more), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    if any("error" in outcome for outcome in outcomes):
        print(done.stdout[-20_000:], done.stderr[-20_000:], sep="\n")  # a worker's own error is only here
    return outcomes


def _run(run: dict[str, Any]) -> Any:
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(skip_tokenizer_init=True, disable_log_stats=True, **run["options"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    sampling = SamplingParams(max_tokens=run["tokens"], temperature=0, detokenize=False, ignore_eos=True, logprobs=2)
    prompts = [{"prompt_token_ids": prompt} for prompt in run["prompts"]]
    answers = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
    del llm
    gc.collect()
    return [
        {"tokens": list(answer.token_ids), "margins": [_margin(step) for step in answer.logprobs]} for answer in answers
    ]


def _margin(step: dict[int, Any]) -> float:
    best = sorted((entry.logprob for entry in step.values()), reverse=True)
    return best[0] - best[1]


if __name__ == "__main__":
    outcomes = [_run(run) for run in json.loads(Path(sys.argv[1]).read_text())]
    print("\n" + json.dumps(outcomes), flush=True)
