"""What a sparse weight is: the format, packing and unpacking. Imports torch and nothing else of this package."""

from flash_llm.tensor.checksum import checksum
from flash_llm.tensor.layout import ValueKind
from flash_llm.tensor.packed import PackedWeight, empty_state, parse_metadata

__all__ = ["PackedWeight", "ValueKind", "checksum", "empty_state", "parse_metadata"]
