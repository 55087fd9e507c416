"""Engines that this package plugs into."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_transformers() -> None:
    """Makes ``from_pretrained`` know compressed folders, now or as soon as transformers' quantizers are imported.

    Importing them takes seconds, which a program that doesn't load models this way need not wait.
    """
    if "transformers.quantizers.auto" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport("transformers.quantizers.auto", _register))


def _register() -> None:
    import flash_llm.integrations.transformers  # noqa: F401  which registers itself


class _AfterImport(MetaPathFinder):
    """Calls ``action`` after the module ``name`` has been imported, once."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
