"""vLLM on a GPU: the sparse kernels under torch.compile and in CUDA graphs give what dense layers give."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_models import PROMPTS, compressed_folder, dense_folder
from vllm_process import generate

from flash_llm.checkpoint import decompress_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

TOKENS = 48
CLOSE = 0.1
"""Two tokens whose logarithms of probability differ by less may change places: sums in float16 are rounded."""


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """For few requests, so that few graphs are captured: up to 64 rows of x, which takes the longest prompt too."""
    own = {"dtype": "float16", "max_model_len": 512, "gpu_memory_utilization": 0.15, "max_num_seqs": 32}
    return {"model": str(folder), **own, **more}


def run(folder: Path, **more: Any) -> dict[str, Any]:
    return {"options": options(folder, **more), "prompts": PROMPTS, "tokens": TOKENS}


def assert_same(got: Any, expected: Any) -> None:
    """The same tokens, up to where two were as good as equal."""
    assert isinstance(got, list), got
    for one, other in zip(got, expected, strict=True):
        apart = next((i for i, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=True)) if a != b), None)
        print("same to token", TOKENS if apart is None else apart, "of", TOKENS)
        assert apart is None or other["margins"][apart] < CLOSE


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_sparse_layers_give_the_tokens_of_dense_ones(kind: str, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", kind, width=1024, dtype=torch.float16)
    small = compressed_folder(tmp_path / "small", dense)
    made_up = {"quantization_config": {"quant_method": "flash_llm", "dummy_sparsity": 0.8}}
    expected, compressed, packed, eager, dummy = generate(
        tmp_path,
        [
            run(dense),
            run(small),
            run(dense, quantization="flash_llm"),
            run(small, enforce_eager=True, max_num_batched_tokens=512, enable_prefix_caching=False),
            run(dense, load_format="dummy", hf_overrides=made_up),
        ],
        timeout=390,
    )
    for got in (compressed, packed, eager):
        assert_same(got, expected)
    assert [len(answer["tokens"]) for answer in dummy] == [TOKENS] * len(PROMPTS)


@pytest.mark.parametrize("values", ["float8_e4m3", "int8"])
def test_8_bit_layers_give_the_tokens_of_the_rounded_weights(values: str, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "llama", width=1024, dtype=torch.float16)
    small = compressed_folder(tmp_path / "small", dense, values=values)
    decompress_folder(small, tmp_path / "rounded", progress=False)
    config = {"quant_method": "flash_llm", "dummy_sparsity": 0.6, "dummy_values": values}
    made_up = {"load_format": "dummy", "hf_overrides": {"quantization_config": config}}
    expected, got, dummy = generate(
        tmp_path, [run(tmp_path / "rounded"), run(small), run(dense, **made_up)], timeout=390
    )
    assert_same(got, expected)
    assert [len(answer["tokens"]) for answer in dummy] == [TOKENS] * len(PROMPTS)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_model(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "llama", width=1024, dtype=torch.float16)
    small = compressed_folder(tmp_path / "small", dense)
    # One after the other: vLLM gives up if another process frees memory of the GPU while it starts.
    (expected,) = generate(tmp_path / "one", [run(dense)])
    (got,) = generate(tmp_path / "two", [run(small, tensor_parallel_size=2)], VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert_same(got, expected)
