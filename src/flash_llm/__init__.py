"""flash-llm: run pruned large language models from compressed weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flash_llm.errors import CheckpointError, FlashLLMError, FormatError, KernelError, SlowPathWarning
from flash_llm.integrations import register_transformers

if TYPE_CHECKING:
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

# torch is imported when one of these is first asked for, so that the command line can answer at once.
_HOMES = {
    "PackedWeight": "flash_llm.tensor",
    "SparseLinear": "flash_llm.nn",
    "compress": "flash_llm.nn",
    "linear": "flash_llm.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_transformers()
