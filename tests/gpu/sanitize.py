"""A few small and odd cases for compute-sanitizer:

compute-sanitizer --tool memcheck|racecheck|synccheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import torch

import flash_llm
from flash_llm import PackedWeight, ops

CASES = [
    (1, 1, 1, 0.0),
    (33, 63, 3, 0.5),
    (300, 1000, 8, 0.8),
    (576, 1536, 16, 0.7),
    (200, 700, 33, 0.6),
    (450, 576, 64, 0.9),
]

for rows, columns, n, sparsity in CASES:
    dense = torch.randn(rows, columns, device="cuda") * (torch.rand(rows, columns, device="cuda") >= sparsity)
    for dtype in (torch.float16, torch.bfloat16):
        packed = PackedWeight.from_dense(dense.to(dtype))
        assert torch.equal(ops.unpack(packed), dense.to(dtype))
        x = torch.randn(n, columns, device="cuda", dtype=dtype)
        error = flash_llm.linear(x, packed).float() - x.float() @ dense.to(dtype).float().t()
        assert error.norm() <= 1e-2 * max(1.0, float(x.float().norm()))
print("all right")
