"""A real model, pruned and compressed: its tokens in vLLM, and a client of ``vllm serve``. On vLLM's CPU build."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_models import CPU_BUILD, greedy
from vllm_process import environment, generate

from flash_llm.checkpoint import compress_folder
from flash_llm.prune import prune_folder

pytestmark = CPU_BUILD

TOKENS = 24
START_S = 240


@pytest.fixture(scope="module")
def compressed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M with 30 % zeros, which by magnitude it bears."""
    path = tmp_path_factory.mktemp("smollm2")
    prune_folder(smollm2, path / "pruned", "magnitude", 0.3)
    compress_folder(path / "pruned", path / "small", progress=False)
    return path / "small"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_real_model_gives_the_tokens_that_it_gives_in_transformers(
    ranks: int, compressed: Path, tmp_path: Path
) -> None:
    """Its 9 heads and 3 of keys and values can be shared by three ranks, and not by two."""
    prompts = [[1, 504, 3575, 282, 4649, 314], [504, 1743, 335, 1343]]
    options = {"model": str(compressed), "dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    run = {"options": options | {"tensor_parallel_size": ranks}, "prompts": prompts, "tokens": TOKENS}
    own = {} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    (outcome,) = generate(tmp_path, [run], **own)
    assert isinstance(outcome, list), outcome
    assert [answer["tokens"] for answer in outcome] == greedy(compressed, prompts, TOKENS)


@pytest.fixture
def server(compressed: Path, tmp_path: Path) -> Iterator[str]:
    """Address of ``vllm serve`` on the compressed folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(compressed), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "small", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment(tmp_path), stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vllm serve did not start: {log.read_text(errors='replace')[-4000:]}")


def test_a_client_streams_a_chat(server: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server, api_key="none")
    question = [{"role": "user", "content": "Name the capital of France."}]
    stream = client.chat.completions.create(
        model="small", messages=question, stream=True, temperature=0, max_tokens=TOKENS
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3
    assert "Paris" in "".join(pieces)
