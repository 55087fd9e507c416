"""Pruned random models whose next tokens are not a toss-up, as dense and compressed folders; marks of their tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    StableLmConfig,
)

from flash_llm.checkpoint import compress_folder
from flash_llm.layers import is_linear

CPU_BUILD = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for vLLM's CPU build"),
]
"""What tests with vLLM's CPU build are marked with."""

VOCABULARY = 320
PROMPTS = [[1, 50, 35, 282, 49, 14], [54, 143, 35], list(range(20, 60))]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
}


def config(kind: str, width: int = 128) -> PreTrainedConfig:
    """Heads of 32 or 64, so that every attention kernel takes them; grouped in Llama and Qwen2."""
    heads = max(4, width // 64)
    if kind == "opt":
        return OPTConfig(
            **_COMMON, hidden_size=width, ffn_dim=2 * width + 32, num_attention_heads=heads, word_embed_proj_dim=width
        )
    if kind == "bloom":
        return BloomConfig(**_COMMON, hidden_size=width, n_head=heads)
    if kind == "gpt2":
        return GPT2Config(**_COMMON, hidden_size=width, n_head=heads)
    made = {"llama": LlamaConfig, "qwen2": Qwen2Config, "stablelm": StableLmConfig}[kind]
    return made(
        **_COMMON,
        hidden_size=width,
        intermediate_size=width + 48,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
    )


def dense_folder(path: Path, kind: str, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with 60 % zeros in its linear layers."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config(kind, width))
    for module in model.modules():
        if is_linear(module):
            module.weight.data.mul_(4).masked_fill_(torch.rand_like(module.weight) < 0.6, 0)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(path)
    return path


def compressed_folder(path: Path, dense: Path, **options: Any) -> Path:
    compress_folder(dense, path, progress=False, **options)
    return path


def greedy(folder: Path, prompts: list[list[int]], tokens: int, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    """What transformers generates."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        model.generation_config.eos_token_id = None
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers
