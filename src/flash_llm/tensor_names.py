"""Where transformers puts the tensors of a checkpoint: under which names of the model, and whether it merges or splits
them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class TensorNames:
    """What transformers does with the names in a model's folder when it loads it.

    Attributes:
        state: the names of the model's parameters and buffers, and what each is.
        converters: that merge or split tensors, by the patterns of the names they take.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state: dict[str, Any] = dict(model.state_dict())
        self.converters = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def target(self, name: str) -> tuple[str | None, str | None]:
        """The model's name for a checkpoint's tensor, None if it has none; and the converter's pattern that took the
        tensor, None if it stays as it is."""
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if target not in self.state and name in self.state:
            return name, None
        return (target, pattern) if target in self.state else (None, None)
