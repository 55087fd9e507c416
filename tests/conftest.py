"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("early") is not None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """``early(begin=...)``: the test comes last, and what it waits for begins before the first test."""
    for item in session.items:
        marker = item.get_closest_marker("early")
        if marker and not session.config.option.collectonly:
            session.config.add_cleanup(marker.kwargs["begin"](**item.callspec.params))  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder, kept in ``FLASH_LLM_TEST_CACHE`` or ``~/.cache/flash-llm-tests``."""
    pytest.importorskip("gguf")
    spec = importlib.util.spec_from_file_location("smollm2_example", EXAMPLES / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cache = Path(os.environ.get("FLASH_LLM_TEST_CACHE", Path.home() / ".cache" / "flash-llm-tests"))
    try:
        return module.make_smollm2(cache / "smollm2-135m-instruct")
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 is neither cached nor to be had: {error}")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """WikiText-2 test."""
    return EXAMPLES / "data" / "wikitext2-test.txt.gz"
