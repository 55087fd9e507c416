"""GPUs as plans know them: capability, multiprocessors, bytes of shared memory that a block may have."""

from __future__ import annotations

from flash_llm.kernels.plan import Device

DEVICES = {
    "A100": Device((8, 0), 108, 166912),
    "A10": Device((8, 6), 72, 101376),
    "L40S": Device((8, 9), 142, 101376),
    "H100": Device((9, 0), 132, 232448),
    "B200": Device((10, 0), 148, 232448),
    "RTX 5090": Device((12, 0), 170, 101376),
}
