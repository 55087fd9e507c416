"""A real model, compressed, generates on the GPU what its pruned dense self generates."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_llm
from flash_llm.prune import prune_folder

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


@pytest.fixture(scope="module")
def pruned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "model"
    prune_folder(smollm2, out, "magnitude", 0.5, progress=False)
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_greedy_tokens_equal_those_of_the_dense_model(smollm2: Path, pruned: Path, dtype: torch.dtype) -> None:
    """Or, where they part, the two tokens were equally likely within the dtype's rounding."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    dense = AutoModelForCausalLM.from_pretrained(pruned, dtype=dtype).cuda()
    small = copy.deepcopy(dense)
    assert flash_llm.compress(small).packed
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.cuda()
        ours, theirs = (
            model.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)[0] for model in (small, dense)
        )
        length = min(len(ours), len(theirs))
        parted = (ours[:length] != theirs[:length]).nonzero()
        if len(parted):
            at = int(parted[0])
            logits = dense(theirs[None, :at]).logits[0, -1].float()
            gap = float((logits[ours[at]] - logits[theirs[at]]).abs())
            assert gap <= 16 * torch.finfo(dtype).eps * float(logits.abs().max()), f"{prompt!r} parts at {at}: {gap}"
