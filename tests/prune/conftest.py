"""Tiny random models of many architectures, as Hugging Face folders with a tokenizer whose tokens are bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 256
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 8},
    "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": LLAMA,
    "gemma2": LLAMA | {"sliding_window": 8},
    "opt": {
        "hidden_size": 36,
        "ffn_dim": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "word_embed_proj_dim": 36,
        "dropout": 0.1,
    },
    "gpt_neox": {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3},
    "gpt2": {"n_embd": 36, "n_inner": 50, "n_layer": 2, "n_head": 3},
    "bloom": {"hidden_size": 36, "n_layer": 2, "n_head": 3},
    "openai-gpt": {"n_embd": 36, "n_layer": 2, "n_head": 3},
    "bamba": LLAMA
    | {
        "attn_layer_indices": [1],
        "mamba_n_heads": 6,
        "mamba_d_head": 12,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "phi": {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3},
}
BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "openai-gpt": "transformer.h",
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of a tiny random model: ``make_model("llama", dtype=..., **config)``."""

    def make(architecture: str, dtype: torch.dtype = torch.float32, shard: str = "20KB", **config: Any) -> Path:
        torch.manual_seed(0)
        settings = AutoConfig.for_model(architecture, **COMMON | CONFIGS[architecture] | config)
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        # Far from their initial values, so that nothing is nearly equal, nor a norm's weight one or a bias zero.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path / f"{architecture}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder, max_shard_size=shard)
        save_tokenizer(folder)
        return folder

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file of 4000 tokens."""
    path = tmp_path / "calibration.txt"
    path.write_text("".join(random.Random(0).choices("abcdefghij klmnop. qrstuvwxyz", k=4000)))
    return path
