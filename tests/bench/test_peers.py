"""What torch offers for sparse weights, as the benchmark builds it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flash_llm.bench.peers import Csr, two_of_four


def test_two_of_four_keeps_the_largest_of_each_four() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 0.0, -1.0, 0.0], [2.0, 2.0, -2.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    kept = torch.tensor([[0.0, -3.0, 2.0, 0.0, 0.0, 0.0, -1.0, 0.0], [2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(two_of_four(weight), kept)


def test_two_of_four_and_the_rest_are_the_weight() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float16)
    kept = two_of_four(weight)
    assert torch.equal(kept + (weight - kept), weight)
    assert ((kept.view(-1, 4) != 0).sum(1) == 2).all()
    best = weight.abs().view(-1, 4).sort(descending=True).values[:, :2].sum(1)
    assert torch.equal(kept.abs().view(-1, 4).sort(descending=True).values[:, :2].sum(1), best)


def test_two_of_four_needs_fours() -> None:
    with pytest.raises(ValueError, match="6 columns"):
        two_of_four(torch.ones(2, 6))


def test_csr_multiplies_and_counts_its_bytes() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    weight[weight < 0.5] = 0
    peer = Csr(weight)
    x = torch.randn(3, 32)
    torch.testing.assert_close(peer(x), F.linear(x, weight))
    assert peer.nbytes == 8 * int((weight != 0).sum()) + 4 * 25
