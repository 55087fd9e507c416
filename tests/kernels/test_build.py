"""Compiling and keeping kernels: racing processes, folders that can't be written to, and a missing compiler."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from flash_llm import KernelError
from flash_llm.kernels import build

pytest.importorskip("cuda.core", reason="cuda-core isn't installed: pip install 'flash-llm[cuda]'")
pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings isn't installed: pip install 'flash-llm[cuda]'")

UNPACK = ("unpack.cu", (("ALIGNED", 1), ("BF16", 0), ("TILE_WORDS", 1), ("VALUES", 0)), "sm_80")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path / "a" / "cache"))
    return tmp_path / "a" / "cache"


@pytest.fixture
def fresh(cache: Path) -> Iterator[None]:
    """Without what was found out about the compiler in this process, before and after."""
    found = (build.compiler_version, build.compiler, build._digest)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("FLASH_LLM_CACHE_DIR", raising=False)
    assert build.cache_dir() == tmp_path / "xdg" / "flash-llm" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_dir() == Path.home() / ".cache" / "flash-llm" / "kernels"
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", "~/kernels")
    assert build.cache_dir() == Path.home() / "kernels"


def test_a_kernel_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.compile_kernel(*UNPACK)
    assert path.parent == cache
    assert path.read_bytes()[:4] == b"\x7fELF"
    monkeypatch.setattr(build, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert build.compile_kernel(*UNPACK) == path
    assert os.listdir(cache) == [path.name]


def test_a_binary_is_of_one_source_one_configuration_one_architecture_and_one_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {build._digest.__wrapped__(*UNPACK)}
    names.add(build._digest.__wrapped__("spmm_sm80.cu", *UNPACK[1:]))
    names.add(build._digest.__wrapped__(UNPACK[0], (("BF16", 1), ("TILE_WORDS", 1)), "sm_80"))
    names.add(build._digest.__wrapped__(*UNPACK[:2], "sm_86"))
    sources = Path(shutil.copytree(build.source_dir(), tmp_path / "csrc"))
    with (sources / "ptx.cuh").open("a") as file:  # a change of any file, since one includes another
        file.write("\n")
    with monkeypatch.context() as patch:
        patch.setattr(build, "source_dir", lambda: sources)
        names.add(build._digest.__wrapped__(*UNPACK))
    monkeypatch.setattr(build, "compiler_version", lambda: "0.1")
    names.add(build._digest.__wrapped__(*UNPACK))
    assert len(names) == 6


def test_racing_processes_leave_one_whole_binary(cache: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        paths = list(processes.map(build.compile_kernel, *zip(UNPACK, UNPACK, strict=True)))
    assert paths[0] == paths[1]
    assert os.listdir(cache) == [paths[0].name]
    assert paths[0].read_bytes() == build.compile_cubin(*UNPACK)[0]


def test_a_folder_that_cannot_be_written_to_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelError, match=r"can't be kept in .*file.cache.*Set FLASH_LLM_CACHE_DIR"):
        build.compile_kernel(*UNPACK)


def test_a_failed_write_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(KernelError, match="No space left"):
        build.compile_kernel(*UNPACK)
    assert os.listdir(cache) == []


@pytest.mark.parametrize(
    ("modules", "what"), [(["cuda.bindings"], "cuda-bindings"), (["cuda.core", "cuda.core.experimental"], "cuda-core")]
)
@pytest.mark.usefixtures("fresh")
def test_a_missing_compiler_is_an_error_in_words(
    modules: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(KernelError, match=rf"{what} is needed.*pip install 'flash-llm\[cuda\]'"):
        build.compile_kernel(*UNPACK)


@pytest.mark.usefixtures("fresh")
def test_a_missing_nvrtc_library_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def missing() -> None:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(KernelError, match=r"NVRTC is needed.*libnvrtc.so.13.*pip install 'flash-llm\[cuda\]'"):
        build.compile_kernel(*UNPACK)


@pytest.mark.usefixtures("cache")
def test_what_the_compiler_says_is_passed_on() -> None:
    with pytest.raises(KernelError, match=r"(?s)unpack.cu can't be compiled for sm_80 with .*TILE_WORDS"):
        build.compile_kernel("unpack.cu", (("BF16", 0),), "sm_80")
    with pytest.raises(KernelError, match="can't be compiled for sm_1"):
        build.compile_kernel("unpack.cu", UNPACK[1], "sm_1")
