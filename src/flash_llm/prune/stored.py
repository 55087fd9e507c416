"""Where a model's parameters are in its folder: under which names, and merged or split by transformers at load."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from flash_llm.errors import CheckpointError
from flash_llm.prune.source import SourceFolder
from flash_llm.tensor_names import TensorNames


class StoredTensors:
    """The tensors of a folder by the parameters of the model that they become, as transformers would load them.

    Args:
        model: the model; its weights may be on the meta device.
        source: the folder.
    """

    def __init__(self, model: PreTrainedModel, source: SourceFolder) -> None:
        self._model, self._source = model, source
        self._names = TensorNames(model)
        self._keys: dict[str, str] = {}  # of parameters that are a tensor of their own
        self._parts: dict[str, list[tuple[str, str]]] = {}  # of others: patterns of a converter and names of tensors
        self._home: dict[str, str] = {}  # of each tensor: the parameter, or the first of several that it becomes
        for key in sorted(source.names, key=dot_natural_key):  # in this order transformers merges them
            self._place(key)
        self._group = {name: first for first in self._parts for name in self._targets(first)}

    def key(self, name: str) -> str | None:
        """The name of the tensor that is a parameter or buffer; None if none is just that."""
        return self._keys.get(name)

    def parts(self, name: str) -> list[str]:
        """The names of the tensors that a parameter is merged from or is a part of."""
        return [key for _, key in self._parts.get(self._group.get(name, ""), [])]

    def under(self, prefix: str) -> list[str]:
        """The names of all tensors that become parameters or buffers of the module ``prefix``."""
        return [key for key in self._source.names if self._home.get(key, "").startswith(prefix + ".")]

    def merged(self, name: str) -> Tensor:
        """A parameter that is merged from tensors or is a part of them.

        Raises:
            CheckpointError: the tensors don't fit together.
        """
        first = self._group[name]
        parts = self._parts[first]
        converter = copy.deepcopy(self._names.converters[parts[0][0]])
        for pattern, key in parts:
            converter.add_tensor(first, key, pattern, self._source.read(key))  # type: ignore[arg-type]
        try:
            converted: Any = converter.convert(first, model=self._model, config=self._model.config)
            # Early releases of transformers 5 give errors beside it.
            value = (converted[0] if isinstance(converted, tuple) else converted)[name]
        except Exception as error:  # whatever shapes that don't fit make transformers raise
            raise CheckpointError(
                f"{self._source.folder}: {name} can't be made of {parts[0][1]} and {len(parts) - 1} other tensors, as "
                f"transformers does: {error}"
            ) from error
        return value[0] if isinstance(value, list) else value

    def _place(self, key: str) -> None:
        target, pattern = self._names.target(key)
        if target is None:
            return
        self._home[key] = target
        if pattern is None:
            self._keys.setdefault(target, key)
        else:
            self._parts.setdefault(target, []).append((pattern, key))

    def _targets(self, first: str) -> list[str]:
        """All parameters that come out of the conversion whose first one is given."""
        patterns = self._names.converters[self._parts[first][0][0]].target_patterns
        return [first, *(first.replace(patterns[0], pattern) for pattern in patterns[1:])]
