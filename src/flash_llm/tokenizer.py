"""A model folder's tokenizer, or a sentence that says why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flash_llm.errors import CheckpointError

_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        CheckpointError: there is none in the folder, or none that transformers can read.
    """
    from transformers import AutoTokenizer  # here, as it takes seconds to import

    if not any(file for pattern in _FILES for file in folder.glob(pattern)):
        # Some releases of transformers would make up an empty one.
        raise CheckpointError(
            f"{folder} has no usable tokenizer: there is no file of one. Copy tokenizer.json and "
            "tokenizer_config.json from where the model came from."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"{folder} has no usable tokenizer: {error}") from error
