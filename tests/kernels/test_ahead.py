"""Kernels compiled in the background are the ones that launches find, and their errors are not lost."""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from flash_llm.errors import KernelError
from flash_llm.kernels import ahead, build

pytest.importorskip("cuda.core", reason="cuda-core isn't installed: pip install 'flash-llm[cuda]'")
pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings isn't installed: pip install 'flash-llm[cuda]'")


def unpack(tile_words: int) -> ahead.Configuration:
    return "unpack.cu", (("ALIGNED", 1), ("BF16", 0), ("TILE_WORDS", tile_words), ("VALUES", 0)), "sm_80"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASH_LLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "_running", {})
    return tmp_path


def test_a_launch_takes_what_was_begun(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel, calls = build.compile_kernel, []

    def counted(*configuration: Any) -> Path:
        calls.append(configuration)
        return compile_kernel(*configuration)

    monkeypatch.setattr(build, "compile_kernel", counted)
    begun = ahead.begin(unpack(size) for size in (1, 2))
    assert ahead.begin([unpack(2)]) == begun[1:], "it is under way already"
    assert {ahead.compiled(*unpack(size)) for size in (1, 2)} == set(cache.iterdir())
    assert len(calls) == 2


def test_what_was_not_begun_is_compiled_where_it_is_needed(cache: Path) -> None:
    assert [ahead.compiled(*unpack(1))] == [*cache.iterdir()]


def test_an_error_is_met_at_the_launch() -> None:
    wait(ahead.begin([("unpack.cu", (), "sm_80")]))
    with pytest.raises(KernelError, match=r"unpack.cu can't be compiled"):
        ahead.compiled("unpack.cu", (), "sm_80")
