"""Perplexity against the loss that transformers computes, and against a known figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flash_llm import evaluate
from flash_llm.evaluate import load_text, perplexity

VOCAB = 97


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (150,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_windows_that_do_not_overlap(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    windows = ids[:144].view(6, 24)
    losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    for batch_size in (1, 4):
        result = perplexity(model, ids, window=24, batch_size=batch_size)
        assert result.perplexity == pytest.approx(math.exp(sum(losses) / 6), rel=1e-5)
        assert (result.windows, result.tokens, result.window, result.stride) == (6, 6 * 23, 24, 24)
    first = perplexity(model, ids[None], window=24, max_windows=2)
    assert first.perplexity == pytest.approx(math.exp(sum(losses[:2]) / 2), rel=1e-5)


@torch.no_grad()
def test_overlapping_windows_predict_each_token_once(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    losses = torch.log_softmax(model(ids[None, :24]).logits[0, :-1], -1)[range(23), ids[1:24]].tolist()
    for last in range(28, 150, 4):
        logits = model(ids[None, last - 24 : last]).logits[0]
        losses += torch.log_softmax(logits[-5:-1], -1)[range(4), ids[last - 4 : last]].tolist()
    result = perplexity(model, ids, window=24, stride=4, batch_size=3)
    assert result.tokens == len(losses) == 23 + 31 * 4
    assert result.perplexity == pytest.approx(math.exp(-sum(losses) / len(losses)), rel=1e-5)


def test_chunks_of_logits_change_nothing(
    model: LlamaForCausalLM, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, ids, window=32).perplexity
    monkeypatch.setattr(evaluate, "_CHUNK_ELEMENTS", 5 * VOCAB)
    assert perplexity(model, ids, window=32).perplexity == whole


def test_the_models_mode_is_put_back(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model.train()
    perplexity(model, ids, window=32)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": 1}, "window=1"),
        ({"window": 65}, "longer than the model's 64 positions"),
        ({"window": 32, "stride": 33}, "stride=33"),
        ({"window": 32, "stride": 0}, "stride=0"),
        ({"window": 32, "max_windows": 0}, "max_windows=0"),
        ({"window": 32, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_arguments_out_of_range(
    model: LlamaForCausalLM, ids: torch.Tensor, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        perplexity(model, ids, **arguments)


def test_texts_that_do_not_do(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has 20 tokens, a window 32"):
        perplexity(model, ids[:20], window=32)
    with pytest.raises(ValueError, match=r"run from 0 to 97, .* from 0 to 96"):
        perplexity(model, torch.arange(98), window=32)
    with pytest.raises(ValueError, match="must be int64"):
        perplexity(model, ids.float(), window=32)
    with pytest.raises(TypeError, match="needs the model's tokenizer"):
        perplexity(model, "text", window=32)


def test_a_loss_that_is_no_number(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    weight = model.model.norm.weight
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="overflow"):
            perplexity(model, ids, window=32)
    finally:
        weight.data.fill_(1.0)


def test_a_real_model_on_wikitext(smollm2: Path, wikitext: Path) -> None:
    """Tokenizer, weights and text together; the figure was computed with float32 by other code."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    text = load_text(wikitext)
    assert len(text) == 1_294_336
    result = perplexity(model, text[:20_000], tokenizer, window=256, max_windows=2)
    assert result.perplexity == pytest.approx(30.9410, rel=1e-4)


@pytest.mark.gpu
def test_the_known_figure(smollm2: Path, wikitext: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).cuda()
    result = perplexity(model, load_text(wikitext), tokenizer, window=1024, max_windows=16)
    assert result.perplexity == pytest.approx(22.88, abs=0.01)
