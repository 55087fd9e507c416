"""vLLM runs compressed folders, and packs pruned ones: the plugin that its entry point ``vllm.general_plugins`` names.

``config.py`` says which layers are packed, ``shares.py`` collects what the files hold of a layer and cuts this rank's
share of it, ``method.py`` multiplies, and ``operator.py`` is what torch.compile sees of that.
"""

from __future__ import annotations

DUMMY_SPARSITY = "dummy_sparsity"
"""Key of a ``quantization_config`` that gives the share of zeros of ``--load-format dummy``'s random weights."""

DUMMY_VALUES = "dummy_values"
"""Key beside it that says how they are stored: "16-bit", the default, "float8_e4m3" or "int8"."""


def register() -> None:
    """Makes vLLM know the quantization method ``flash_llm``. vLLM calls it in each of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from flash_llm.checkpoint import QUANT_METHOD
    from flash_llm.integrations.vllm.config import FlashLLMConfig

    register_quantization_config(QUANT_METHOD)(FlashLLMConfig)
