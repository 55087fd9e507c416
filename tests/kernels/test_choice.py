"""Which kernel is in use: by the environment, or for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from devices import DEVICES
from flash_llm.kernels import choice, cuda, plan, tuned

WEIGHT = (4096, 4096, 4096 * 4096 // 32, 9, 5)  # rows, columns, packets, max_packets, tile_words


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice.of_environment.cache_clear()
    yield
    choice.of_environment.cache_clear()


def test_the_environment_chooses_and_a_block_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.kernel() == "auto"
    monkeypatch.setenv(choice.VARIABLE, "portable")
    assert choice.kernel() == "auto", "it is read once"
    choice.of_environment.cache_clear()
    assert choice.kernel() == "portable"
    with choice.using("auto"):
        assert choice.kernel() == "auto"
        with pytest.raises(ZeroDivisionError), choice.using("portable-99kb"):
            _ = 1 / 0
        assert choice.kernel() == "auto"
    assert choice.kernel() == "portable"


def test_an_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "kernel 'fast': it takes auto, portable or portable-99kb"
    with pytest.raises(ValueError, match=words), choice.using("fast"):
        pass
    monkeypatch.setenv(choice.VARIABLE, "fast")
    choice.of_environment.cache_clear()
    with pytest.raises(ValueError, match=r"FLASH_LLM_KERNEL 'fast': it takes auto"):
        choice.kernel()


def test_the_portable_kernel_runs_on_hopper_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch takes follows the switch at once, though plans are kept."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tuned, "table", lambda device, kernel: {})
    cuda.forget_plans()

    def chosen() -> plan.SpmmPlan:
        return cuda.spmm_plan_cached(0, *WEIGHT, 8, False, choice.kernel())

    try:
        hopper = chosen()
        with choice.using("portable"):
            portable = chosen()
        with choice.using("portable-99kb"):
            small = chosen()
        assert hopper.source == "spmm_sm90.cu"
        assert portable.source == small.source == "spmm_sm80.cu"
        assert small.shared <= 99 << 10 < portable.shared, "each as large as its shared memory allows"
        assert chosen() == hopper
    finally:
        cuda.forget_plans()


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_where_the_portable_kernel_is_the_gpus_own_nothing_changes(name: str) -> None:
    device = DEVICES[name]
    plans = [plan.spmm_plan(choice.seen_as(device, kernel), *WEIGHT, 8, False) for kernel in ("auto", "portable")]
    assert (plans[0] == plans[1]) == (device.capability != (9, 0))
