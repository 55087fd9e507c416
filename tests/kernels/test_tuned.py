"""Plans that were found by tuning: taken where they fit and nowhere else, and kept in one file a GPU and source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from devices import DEVICES
from flash_llm.cli import app
from flash_llm.errors import KernelError
from flash_llm.kernels import build, cuda, plan, tuned
from flash_llm.tensor.layout import LANES, PACKET_VALUES, grid

H100 = DEVICES["H100"]
WEIGHT = (4096, 4096, 4096 * 4096 * 3 // 10 // PACKET_VALUES, 10, 5)
PLACE = (4096, 4096, 5)
ROW = {"kernel": "auto", **dict(zip(tuned.PLACE, (*PLACE, 1, 1), strict=True)), "warps": 8, "resident": 1}
PROPERTIES = SimpleNamespace(
    name="NVIDIA Test 80GB",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU that torch believes in, and an empty cache folder."""
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASH_LLM_KERNEL", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: PROPERTIES.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    for forget in (cuda.forget_plans, tuned.table.cache_clear):
        forget()
    yield tmp_path / "cache"
    for forget in (cuda.forget_plans, tuned.table.cache_clear):
        forget()


def test_the_table_decides_for_its_place_alone() -> None:
    usual = plan.spmm_plan(H100, *WEIGHT, 8, False)
    other = (8, 1) if tuned.choice_of(usual) != (8, 1) else (4, 2)
    table = {(*PLACE, 1, 1): other}
    chosen = tuned.spmm_plan(table, H100, WEIGHT, 8, False)
    assert tuned.choice_of(chosen) == other
    assert chosen == plan.spmm_plan(H100, *WEIGHT, 8, False, warps=other[0], resident=other[1])
    assert tuned.choice_of(tuned.spmm_plan(table, H100, WEIGHT, 3, True)) == other, "of the same kernel"
    assert tuned.spmm_plan(table, H100, WEIGHT, 9, False) == plan.spmm_plan(H100, *WEIGHT, 9, False)
    wider = (4096, 4160, *WEIGHT[2:])
    assert tuned.spmm_plan(table, H100, wider, 8, False) == plan.spmm_plan(H100, *wider, 8, False)
    assert tuned.spmm_plan({}, H100, WEIGHT, 8, False) == usual


def test_a_choice_that_does_not_fit_this_weight_is_not_taken() -> None:
    """The same shape and tile size, but with one lane that is full: the block no longer fits into shared memory."""
    table = {(*PLACE, 4, 1): (8, 2)}
    assert tuned.choice_of(tuned.spmm_plan(table, H100, WEIGHT, 32, False)) == (8, 2)
    full = (*WEIGHT[:3], 12, WEIGHT[4])
    assert tuned.spmm_plan(table, H100, full, 32, False) == plan.spmm_plan(H100, *full, 32, False)


@pytest.mark.parametrize(("name", "n"), [*product(sorted(DEVICES), (1, 16, 64, 128, 256))])
def test_all_candidates_fit_and_multiply_the_same_x(name: str, n: int) -> None:
    device = DEVICES[name]
    found = tuned.candidates(device, WEIGHT, n, False)
    assert next(iter(found.values())) == plan.spmm_plan(device, *WEIGHT, n, False), "the usual one first"
    for (warps, resident), chosen in found.items():
        assert tuned.choice_of(chosen)[0] == warps
        assert resident * (chosen.shared + 1024 + 128) <= device.shared_memory + 1024
        assert chosen.threads <= 1024
    assert len({(chosen.source, tuned.blocks_of_x(chosen)) for chosen in found.values()}) == 1
    assert name != "H100" or len(found) > 1, "there is something to choose from"


def test_rings_of_two_pieces_leave_a_choice() -> None:
    rows, columns, *_ = WEIGHT
    strips, _, tiles = grid(rows, columns, 8)
    found = tuned.candidates(H100, (rows, columns, 7 * strips * tiles * LANES, 9, 8), 64, False)
    assert dict(found[12, 1].defines)["STAGES"] == 2
    assert found.keys() >= {(4, 1), (4, 2), (8, 1), (12, 1)}


def test_what_is_kept_is_used_at_once_and_in_the_next_process(gpu: Path) -> None:
    def chosen(kernel: str) -> tuned.Choice:
        cuda.forget_plans()
        return tuned.choice_of(cuda.spmm_plan_cached(0, *WEIGHT, 8, False, kernel))

    usual = chosen("auto"), chosen("portable")
    assert usual[0] != (8, 1)
    file = tuned.keep([ROW], 0)
    assert file.parent == gpu
    assert file.name.startswith("tuned-nvidia-test-80gb-")
    assert (chosen("auto"), chosen("portable")) == ((8, 1), usual[1]), "of the kernel that was tuned"
    tuned.table.cache_clear()  # as in another process
    assert chosen("auto") == (8, 1)
    tuned.keep([ROW | {"n_blocks": 2}, ROW | {"warps": 4}], 0)
    assert tuned.table(0, "auto") == {(*PLACE, 1, 1): (4, 1), (*PLACE, 2, 1): (8, 1)}, "newer rows replace older ones"


def test_other_sources_or_another_gpu_are_not_tuned(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.keep([ROW], 0)
    assert tuned.table(0, "auto")
    tuned.table.cache_clear()
    monkeypatch.setattr(tuned, "_digest", lambda: "other")
    assert not tuned.table(0, "auto")
    monkeypatch.undo()
    assert tuned._digest() != "other"


def test_the_file_is_named_after_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spmm.cuh").write_text("a")
    monkeypatch.setattr(build, "source_dir", lambda: tmp_path)
    before = tuned._digest.__wrapped__()
    (tmp_path / "spmm.cuh").write_text("b")
    assert tuned._digest.__wrapped__() != before


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"plans": [{}]}',
        json.dumps({"plans": [ROW | {"warps": "8"}]}),
        json.dumps({"plans": [ROW | {"rows": 0}]}),
    ],
)
def test_a_damaged_file_is_named_and_never_passed_over(gpu: Path, content: str) -> None:
    file = tuned.path(0)
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(KernelError, match=rf"{file}.*can't be read.*: remove it, and tune again"):
        tuned.table(0, "auto")
    report = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert report["gpus"][0]["tuned_plans"].startswith("can't be used")


def test_env_says_whether_plans_were_tuned(gpu: Path) -> None:
    def said() -> str:
        return json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)["gpus"][0]["tuned_plans"]

    assert said() == "none"
    file = tuned.keep([ROW], 0)
    assert said() == f"1 in {file}"


def test_every_candidate_compiles() -> None:
    """Plans that nobody takes of himself: enough registers for their sums, and the right defines.

    On Hopper multiplying warps ask for registers that the block must have begun with, or they would wait for ever.
    """
    pytest.importorskip("cuda.core", reason="cuda-core isn't installed: pip install 'flash-llm[cuda]'")
    for n, (name, arch) in product((8, 64, 256), {"H100": "sm_90a", "A100": "sm_80"}.items()):
        for chosen in tuned.candidates(DEVICES[name], WEIGHT, n, False).values():
            binary, log = build.compile_cubin(chosen.source, chosen.defines, arch)
            assert binary[:4] == b"\x7fELF"
            if arch == "sm_90a":
                (used,) = map(int, re.findall(r"Used (\d+) registers", log))
                multiplying, fetching = (dict(chosen.defines)[name] for name in ("REGISTERS", "FETCH_REGISTERS"))
                others = plan.FETCH_WARPS * LANES
                assert multiplying * (chosen.threads - others) + fetching * others <= used * chosen.threads
