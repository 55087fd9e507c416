"""Tiny random models of several architectures, as pruned dense folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from flash_llm.layers import is_linear

VOCABULARY = 97

_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
_COMMON = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": lambda: LlamaConfig(
        **_COMMON, hidden_size=72, intermediate_size=110, num_attention_heads=6, num_key_value_heads=2
    ),
    "llama-tied": lambda: LlamaConfig(
        **_COMMON, hidden_size=64, intermediate_size=80, num_attention_heads=4, tie_word_embeddings=True
    ),
    "opt": lambda: OPTConfig(**_COMMON, hidden_size=52, ffn_dim=130, num_attention_heads=4, word_embed_proj_dim=40),
    "qwen2": lambda: Qwen2Config(
        **_COMMON, hidden_size=60, intermediate_size=90, num_attention_heads=6, num_key_value_heads=3
    ),
    "gpt2": lambda: GPT2Config(**_GPT2),  # its layers' weights are the other way round
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, hidden_size=48, intermediate_size=100, num_attention_heads=4),
}
ODD_CONFIGS = {
    "falcon": lambda: FalconConfig(  # its layers are a kind of nn.Linear of its own
        **_COMMON, hidden_size=64, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    ),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**_GPT2),  # initialises its layers' weights by name
}


def pruned_model(kind: str, sparsity: float = 0.6, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random model, ``sparsity`` of each linear layer's weights zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config((CONFIGS | ODD_CONFIGS)[kind]()).eval()
    for module in model.modules():
        if is_linear(module):
            module.weight.data.masked_fill_(torch.rand_like(module.weight) < sparsity, 0.0)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 1:  # biases and norms that matter
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def pruned_folder(path: Path, kind: str = "llama", **options: object) -> Path:
    """:func:`pruned_model` as a folder."""
    save = {key: options.pop(key) for key in ("max_shard_size",) if key in options}
    pruned_model(kind, **options).save_pretrained(path, **save)  # type: ignore[arg-type]
    (path / "tokenizer.json").write_text('{"some": "tokenizer"}')
    return path


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of a fixed prompt, [1, 9, vocabulary]."""
    with torch.no_grad():
        return model(torch.arange(3, 12)[None]).logits
