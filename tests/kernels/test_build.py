"""Every kernel compiles for every target without a GPU, and none of them spills registers or uses local memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flash_llm.errors import KernelError
from flash_llm.kernels import build, plan
from flash_llm.tensor.layout import LANE_CAPACITY, PACKET_VALUES, TILE_WORDS, grid

pytest.importorskip("cuda.core", reason="kernels are compiled by cuda-core, an optional dependency")

DEVICES = {
    "sm_80": plan.Device((8, 0), 108, 166912),
    "sm_86": plan.Device((8, 6), 84, 101376),
    "sm_89": plan.Device((8, 9), 128, 101376),
    "sm_90a": plan.Device((9, 0), 132, 232448),
    "sm_100a": plan.Device((10, 0), 148, 232448),
    "sm_120a": plan.Device((12, 0), 170, 101376),
}
CASES = [("sm_90a", tile_words, n) for tile_words in TILE_WORDS for n in (8, 16, 32, 64)]
CASES += [(arch, *case) for arch in DEVICES if arch != "sm_90a" for case in ((3, 64), (8, 8), (16, 16))]


def planned(arch: str, tile_words: int, n: int, bf16: bool) -> plan.SpmmPlan:
    """The plan for a large matrix whose lanes' tiles are about two thirds full."""
    rows, columns = 7168, 7168
    mean = min(60, 30 * tile_words)
    strips, _, tiles = grid(rows, columns, tile_words)
    packets = strips * tiles * 32 * (mean + 3.5) / PACKET_VALUES
    most = min(LANE_CAPACITY, 32 * tile_words) // PACKET_VALUES
    return plan.spmm_plan(DEVICES[arch], rows, columns, int(packets), most, tile_words, n, bf16)


def assert_fits_registers(log: str) -> None:
    assert re.findall(r"(\d+) bytes stack frame", log) == ["0"], log
    assert re.findall(r"(\d+) bytes spill stores", log) == ["0"], log


@pytest.mark.parametrize(("arch", "tile_words", "n"), CASES)
def test_the_sparse_kernel_compiles(arch: str, tile_words: int, n: int) -> None:
    chosen = planned(arch, tile_words, n, bf16=(tile_words + n // 8) % 2 == 0)
    assert chosen.shared <= DEVICES[arch].shared_memory
    assert_fits_registers(build.compile_cubin(chosen.source, chosen.defines, arch)[1])


@pytest.mark.parametrize("arch", DEVICES)
def test_unpacking_compiles(arch: str) -> None:
    for tile_words in (1, 16):
        defines = (("BF16", tile_words % 2), ("TILE_WORDS", tile_words))
        assert_fits_registers(build.compile_cubin("unpack.cu", defines, arch)[1])


def test_processes_that_race_leave_one_whole_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path))
    defines = (("BF16", 0), ("TILE_WORDS", 2))
    code = f"from flash_llm.kernels import build; build.compile_kernel('unpack.cu', {defines!r}, 'sm_80')"
    racing = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in racing] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == [build.compile_kernel("unpack.cu", defines, "sm_80").name]


def test_a_folder_that_cant_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelError, match="FLASH_LLM_CACHE_DIR"):
        build.compile_kernel("unpack.cu", (("BF16", 0), ("TILE_WORDS", 1)), "sm_80")


def test_a_missing_compiler_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    build.compiler_version.cache_clear()
    with pytest.raises(KernelError, match=r"pip install 'flash-llm\[cuda\]'"):
        build.compiler_version()


def test_an_unknown_setting_is_the_compilers_error() -> None:
    with pytest.raises(KernelError, match="can't be compiled"):
        build.compile_cubin("unpack.cu", (("BF16", 0),), "sm_80")
