"""Compressed folders in vLLM's CPU build: the same tokens as in transformers, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_models import CPU_BUILD, PROMPTS, compressed_folder, dense_folder, greedy
from vllm_process import environment, generate

pytestmark = CPU_BUILD

TOKENS = 16


def run(folder: Path, **more: Any) -> dict[str, Any]:
    options = {"model": str(folder), "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True}
    return {"options": options | more, "prompts": PROMPTS, "tokens": TOKENS}


def tokens(outcome: Any) -> list[list[int]]:
    assert isinstance(outcome, list), outcome
    return [answer["tokens"] for answer in outcome]


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2", "stablelm", "gpt2"])
def test_compressed_folders_and_packing_at_load_give_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", kind)
    small = compressed_folder(tmp_path / "small", dense)
    mixed = compressed_folder(tmp_path / "mixed", dense, skip=[r"k_proj$", r"lm_head$"])  # q and v packed, k dense
    expected = greedy(dense, PROMPTS, TOKENS)
    outcomes = generate(tmp_path, [run(small), run(mixed), run(dense, quantization="flash_llm")])
    for outcome in outcomes:
        assert tokens(outcome) == expected


@pytest.mark.parametrize("values", ["float8_e4m3", "int8"])
def test_8_bit_folders_and_8_bit_weights_that_are_made_up(values: str, tmp_path: Path) -> None:
    """Also with one part of a merged layer dense, which takes the others back to 16 bits: few are lost to float16."""
    dense = dense_folder(tmp_path / "dense", "llama", dtype=torch.float16)
    small = compressed_folder(tmp_path / "small", dense, values=values)
    mixed = compressed_folder(tmp_path / "mixed", dense, values=values, skip=[r"k_proj$", r"lm_head$"])
    config = {"quant_method": "flash_llm", "dummy_sparsity": 0.6, "dummy_values": values}
    made_up = {"load_format": "dummy", "hf_overrides": {"quantization_config": config}}
    unknown = {**made_up, "hf_overrides": {"quantization_config": config | {"dummy_values": "int3"}}}
    outcomes = generate(tmp_path, [run(small), run(mixed), run(dense, **made_up), run(dense, **unknown)])
    assert tokens(outcomes[0]) == greedy(small, PROMPTS, TOKENS)
    assert tokens(outcomes[1]) == greedy(mixed, PROMPTS, TOKENS)
    assert all(len(answer) == TOKENS for answer in tokens(outcomes[2]))
    assert "values='int3': it takes one of" in outcomes[3]["error"]


@pytest.mark.parametrize("values", ["16-bit", "int8"])
def test_two_ranks_share_a_compressed_model(values: str, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "llama")
    small = compressed_folder(tmp_path / "small", dense, values=values)
    (outcome,) = generate(
        tmp_path,
        [run(small, tensor_parallel_size=2)],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert tokens(outcome) == greedy(small, PROMPTS, TOKENS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_benchmark_asks_an_engine_in_a_process_of_its_own(ranks: int, tmp_path: Path) -> None:
    """As ``vllm serve`` runs it: what is asked of the workers has to reach them."""
    dense = dense_folder(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    small = compressed_folder(tmp_path / "small", dense)
    what = ["--model", str(dense), "--weights", str(small), "--gpus", str(ranks), "--out", str(tmp_path / "out")]
    lengths = ["--batch", "2", "--input-len", "8", "--output-len", "8", "--dtype", "bfloat16", "--eager"]
    done = subprocess.run(
        [sys.executable, "-m", "flash_llm", "bench", "e2e", *what, *lengths],
        env=environment(tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="|".join("01"[:ranks])),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "e2e.json").read_text())
    assert report["not_measured"] == []
    (row,) = report["results"]
    assert report["environment"]["engine_process"] == "own"
    assert row["gpus"] == ranks
    assert row["tokens_per_gpu_second"] == pytest.approx(row["tokens_per_second"] / ranks)
    assert row["weight_bytes"] > 0


def edit(folder: Path, **changes: Any) -> None:
    """Changes the record of a compressed folder and signs that."""
    from flash_llm.checkpoint import accept_config

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    if "format_version" not in changes:
        accept_config(folder)


def test_graphs_are_changed_only_where_nobody_else_changes_them() -> None:
    from flash_llm.integrations.vllm.passes import add_passes, fold_relu

    config: dict[str, Any] = {}
    add_passes(config, "place")
    assert config["place"].callable is fold_relu
    assert config["place"].uuid() == type(config["place"])(fold_relu).uuid(), "for vLLM's cache of compiled graphs"
    taken = {"place": (other := object())}
    add_passes(taken, "place")
    assert taken["place"] is other


def test_what_cannot_be_run_is_refused_in_a_sentence(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", "llama")
    newer = compressed_folder(tmp_path / "newer", dense)
    edit(newer, format_version=99)
    head = compressed_folder(tmp_path / "head", dense, skip=[])
    bloom = compressed_folder(tmp_path / "bloom", dense_folder(tmp_path / "dense-bloom", "bloom"))
    dummy = {"load_format": "dummy", "quantization": "flash_llm"}
    made_up = {"quantization_config": {"quant_method": "flash_llm", "dummy_sparsity": 0.8}}
    outcomes = generate(
        tmp_path,
        [
            run(newer),
            run(head),
            run(bloom),
            run(dense, **dummy),
            run(
                dense,
                load_format="dummy",
                hf_overrides={"quantization_config": {**made_up["quantization_config"], "dummy_sparsity": 1}},
            ),
            run(dense, load_format="dummy", hf_overrides=made_up),
        ],
    )
    for outcome, words in zip(
        outcomes[:5],
        [
            "99; this release reads versions 1, 3 and 4: upgrade flash-llm",
            "--skip 'lm_head'",
            "--skip 'query_key_value'",
            "how many zeros",
            "from 0 up to, not including, 1",
        ],
        strict=True,
    ):
        assert words in outcome["error"]
    assert all(len(answer) == TOKENS for answer in tokens(outcomes[5]))
