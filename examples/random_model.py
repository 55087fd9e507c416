"""A model's folder with random weights, as many of them zeros as one likes: to measure what does not depend on the
values, such as how fast a folder is loaded, without its real weights.

    python examples/random_model.py llama-3-8b random-8b --sparsity 0.7
    flash-llm compress random-8b --out random-8b-small
    flash-llm bench e2e --model random-8b-small --weights random-8b-small --batch 8 --out RESULTS    # load, GB/s

The model is a name that ``flash-llm plan`` knows, or a folder with a config.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flash_llm.capacity.models import BUILT_IN
from flash_llm.folder import ShardWriter, new_folder
from flash_llm.layers import is_linear
from flash_llm.staying_dense import output_layer

SHARD_BYTES = 4 << 30
SCALE = 0.02  # of the weights, as models are initialised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--sparsity", type=float, default=0.7, help="share of zeros in linear layers but the output layer"
    )
    parser.add_argument("--layers", type=int, help="of the model's layers so many; all unless told")
    given = parser.parse_args()
    config = read_config(given.model)
    if given.layers is not None:
        config.num_hidden_layers = given.layers
    write(config, given.out, given.sparsity)


def read_config(model: str) -> PreTrainedConfig:
    if model in BUILT_IN:
        known = dict(BUILT_IN[model])
        return AutoConfig.for_model(known.pop("model_type"), **known)
    return AutoConfig.from_pretrained(model)


def write(config: PreTrainedConfig, out: Path, sparsity: float) -> None:
    """Writes config.json and float16 weights in shards, one tensor at a time in memory besides the shard's own."""
    config.dtype = torch.float16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    config.architectures = [type(model).__name__]
    with new_folder(out, sum(parameter.nbytes for parameter in model.parameters())) as folder:
        config.save_pretrained(folder)
        writer = ShardWriter(folder, SHARD_BYTES)
        for name, tensor in random_tensors(model, sparsity):
            writer.add(name, tensor)
        writer.close()
    print(f"{writer.nbytes * 1e-9:.2f} GB")


def random_tensors(model: nn.Module, sparsity: float) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and values, of tied ones the first. Made on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    head = output_layer(model)
    linears = {f"{name}.weight" for name, module in model.named_modules() if is_linear(module) and name != head}
    for name, parameter in model.named_parameters():
        tensor = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float16) * SCALE
        if name in linears:
            zeros = torch.rand(parameter.shape, generator=generator, device=device) < sparsity
            tensor.masked_fill_(zeros, 0)
        elif parameter.dim() == 1 and name.endswith("weight"):
            tensor += 1  # of a norm
        yield name, tensor.cpu()


if __name__ == "__main__":
    main()
