"""What is changed in the graphs that vLLM compiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from flash_llm.integrations.vllm.operator import LINEAR_AT


def fold_relu(graph: fx.Graph) -> None:
    """Lets a packed layer's kernel do the ReLU that follows it, as in OPT: a kernel less for each layer and step."""
    for relu in graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        product = relu.args[0]
        if product.target is not LINEAR_AT or len(product.users) > 1:
            continue
        product.kwargs = {**product.kwargs, "relu": True}
        relu.replace_all_uses_with(product)
        graph.erase_node(relu)


def add_passes(inductor_config: dict[str, Any], key: str) -> None:
    """Has vLLM apply :func:`fold_relu`, unless something else is in the place that it leaves for a pass of others.

    Args:
        inductor_config: ``CompilationConfig.inductor_compile_config``.
        key: of that place.
    """
    from vllm.compilation.passes.inductor_pass import CallableInductorPass

    if key not in inductor_config:
        inductor_config[key] = CallableInductorPass(fold_relu)
