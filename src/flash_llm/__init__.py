"""flash-llm: run pruned large language models from compressed weights."""

from flash_llm.errors import CheckpointError, FlashLLMError, FormatError, KernelError, SlowPathWarning
from flash_llm.nn import SparseLinear, compress
from flash_llm.ops import linear
from flash_llm.tensor import PackedWeight

__version__ = "0.1.0.dev0"

__all__ = [
    "CheckpointError",
    "FlashLLMError",
    "FormatError",
    "KernelError",
    "PackedWeight",
    "SlowPathWarning",
    "SparseLinear",
    "__version__",
    "compress",
    "linear",
]
