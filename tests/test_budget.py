"""A model that fits into so many bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flash_llm.budget import parse_bytes, sparsity_for_bytes
from flash_llm.checkpoint import compress_folder, read_folder
from flash_llm.prune import prune_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("share", "values"), [(0.8, "16-bit"), (0.55, "16-bit"), (0.3, "16-bit"), (0.6, "fp8"), (0.4, "int8"), (0.3, "fp8")]
)
def test_a_pruned_model_fits_and_wastes_little(share: float, values: str, model: Path, tmp_path: Path) -> None:
    budget = int(read_folder(model).nbytes * share)
    sparsity = sparsity_for_bytes(model, budget, values=values)
    prune_folder(model, tmp_path / "pruned", "magnitude", sparsity, values=values, progress=False)
    compress_folder(tmp_path / "pruned", tmp_path / "small")
    assert 0.88 * budget < read_folder(tmp_path / "small").nbytes <= budget


def test_what_fits_already_or_never_is_refused(model: Path) -> None:
    dense = read_folder(model).nbytes
    with pytest.raises(ValueError, match=r"fits into .* bytes as is"):
        sparsity_for_bytes(model, dense)
    with pytest.raises(ValueError, match=r"can't fit into .* bytes: at 95% zeros"):
        sparsity_for_bytes(model, dense // 20)
    assert sparsity_for_bytes(model, dense - 1000) == 0.31  # the least that is worth packing


@pytest.mark.parametrize(("text", "nbytes"), [("24GB", 24 * 10**9), ("1.5 gib", 3 << 29), ("12345", 12345)])
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24 parsecs", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)
