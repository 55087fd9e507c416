"""Layers that can't be packed stay dense, and what was packed in memory can be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    FalconMambaConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
)

import flash_llm
from flash_llm.checkpoint import compress_folder, verify_folder
from flash_llm.integrations.transformers import FlashLLMConfig
from flash_llm.nn import sparse_layers
from flash_llm.staying_dense import computed_with

TOKENS = torch.tensor([[3, 14, 15, 9, 26]])
SIZES = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 1}
CONFIGS: dict[str, tuple[Any, str]] = {
    "mamba": (MambaConfig(**SIZES, state_size=4, time_step_rank=32), "backbone.layers.0.mixer.dt_proj"),
    "falcon_mamba": (FalconMambaConfig(**SIZES, state_size=4, time_step_rank=32), "backbone.layers.0.mixer.dt_proj"),
    "biogpt": (BioGptConfig(**SIZES, intermediate_size=80, num_attention_heads=2), "output_projection"),
}


def model_of(config: Any, sparsity: float = 0.7) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "output" not in name:
            module.weight.data.masked_fill_(torch.rand(module.weight.shape) < sparsity, 0)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits.float()


def loaded(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kwargs).eval()


@pytest.mark.filterwarnings("ignore::flash_llm.SlowPathWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_weight_that_others_compute_with_stays_dense(name: str, tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj's weight itself, and BioGPT's output layer shares the embedding's."""
    config, layer = CONFIGS[name]
    model = model_of(config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "dense")
    report = compress_folder(tmp_path / "dense", tmp_path / "packed", skip=(), min_sparsity=0)
    assert layer not in report.packed
    torch.testing.assert_close(logits(loaded(tmp_path / "packed")), expected, atol=0.02, rtol=0.02)
    at_load = loaded(tmp_path / "dense", quantization_config=FlashLLMConfig(skip=()))
    in_place = flash_llm.compress(model, skip=())
    assert layer in in_place.skipped
    assert in_place.packed
    for packed in (at_load, model):
        assert layer not in sparse_layers(packed)
        torch.testing.assert_close(logits(packed), expected, atol=0.02, rtol=0.02)


def test_what_a_class_computes_with_is_read_off_its_code() -> None:
    """LongCat's router is such a class."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier, self.other, self.rare, self.usual = (nn.Linear(8, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x @ self.rare.weight.T
            if not self.training:
                x = x @ self.usual.weight.T
            return nn.functional.linear(x.to(self.other.weight.dtype), self.classifier.weight.float())

    assert computed_with(Router) == {"classifier", "usual"}
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    assert not any(computed_with(type(module)) for module in bloom.modules())  # but for an option that nobody takes


@pytest.mark.filterwarnings("ignore::flash_llm.SlowPathWarning")
def test_a_model_packed_in_memory_is_saved_as_a_compressed_folder(tmp_path: Path) -> None:
    model = model_of(LlamaConfig(**SIZES, intermediate_size=96, num_attention_heads=2))
    report = flash_llm.compress(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert verify_folder(tmp_path, progress=False) > len(report.packed)
    again = loaded(tmp_path)
    assert sorted(sparse_layers(again)) == sorted(report.packed)
    assert torch.equal(logits(again), expected)


def test_the_output_layer_is_left_out_whatever_its_name(tmp_path: Path) -> None:
    untied = BioGptConfig(**SIZES, intermediate_size=80, num_attention_heads=2, tie_word_embeddings=False)
    model = model_of(untied)
    model.save_pretrained(tmp_path / "dense")
    report = compress_folder(tmp_path / "dense", tmp_path / "packed", values="int8", min_sparsity=0)
    assert report.skipped["output_projection"] == "it is the output layer"
    every = compress_folder(tmp_path / "dense", tmp_path / "every", skip=(), min_sparsity=0)
    assert "output_projection" in every.packed
    assert flash_llm.compress(model).skipped["output_projection"] == "it is the output layer"


def test_a_float32_layer_among_others_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.float16), nn.Linear(64, 64))
    report = flash_llm.compress(model)
    assert report.packed == ["0"]
    assert report.skipped == {"1": "it is in float32, and other layers are not"}
